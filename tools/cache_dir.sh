# Sourced by the fetch scripts. narrows_cache is where downloads and the llama.cpp build are kept, shared by all
# clones of one user; the folder may be deleted at any time. cmake/llama_cpp.cmake computes the same path.
narrows_cache=${NARROWS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/narrows}

# die SENTENCE: what went wrong and what to do, then exit code 1.
die() {
  echo "$(basename "$0" .sh): $*" >&2
  exit 1
}

# sha256_is FILE SUM: whether FILE is there and is what we pinned.
sha256_is() {
  [[ -f $1 && $(sha256sum <"$1") == "$2  -" ]]
}

# need_pip: pip is the only client of the package registry that we use.
need_pip() {
  python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip; run \`make deps\` (Debian: python3-pip)."
}
