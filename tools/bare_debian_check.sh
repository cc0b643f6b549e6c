#!/usr/bin/env bash
# bare_debian_check.sh [--worktree] FOLDER demo|test: does `make demo` or `make test` work from nothing?
#
# Makes a bare Debian 12 (debootstrap's minbase and make) in FOLDER, clones this checkout into it (--worktree: its
# files as they are, committed or not), runs make in a chroot and prints the time. A FOLDER from an earlier call is
# used again as it is, which measures the second run. Needs root, debootstrap and 4 GB; delete FOLDER afterwards.
set -euo pipefail

fail() {
  echo "bare_debian_check: $*" >&2
  exit 2
}

worktree=
if [[ ${1:-} == --worktree ]]; then
  worktree=1
  shift
fi
if [[ $# != 2 || ! $2 =~ ^(demo|test)$ ]]; then
  fail "usage: bare_debian_check.sh [--worktree] FOLDER demo|test"
fi
((EUID == 0)) || fail "debootstrap and chroot need root."
command -v debootstrap >/dev/null || fail "debootstrap is not installed (Debian: apt-get install debootstrap)."
root=$(realpath -m "$1")
target=$2
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bare_debian() {
  # This machine's own mirror, as apt knows it.
  local mirror=${MIRROR:-$(apt-get indextargets --format '$(CODENAME) $(SITE)' 'Created-By: Packages' |
    sed -n 's/^bookworm //p' | head -n 1)}
  [[ -n $mirror ]] || fail "apt has no mirror of Debian 12 here; name one with MIRROR=."
  echo "bare_debian_check: making a bare Debian 12 in $root" >&2
  mkdir -p "$root"
  debootstrap --variant=minbase --include=make bookworm "$root" "$mirror" >"$root.debootstrap.log" 2>&1 ||
    fail "debootstrap failed; its messages are in $root.debootstrap.log"
  rm "$root.debootstrap.log"

  # How this machine reaches the network: names, apt's transport, pip's configuration, certificates.
  cp --dereference /etc/resolv.conf /etc/hosts "$root/etc/"
  apt-config dump | grep '^Acquire::' >"$root/etc/apt/apt.conf.d/90outside" || true
  local file
  for file in /etc/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
    [[ ! -r $file ]] || install -D -m 600 "$file" "$root/${file/#$HOME//root}"
  done
  # A file of its own: installing ca-certificates would write over the usual one.
  cp --dereference "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$root/etc/outside-certificates.pem" 2>/dev/null || true

  if [[ $worktree ]]; then
    mkdir "$root/root/narrows"
    (cd "$checkout" && git ls-files -z --cached --others --exclude-standard |
      tar --create --null --ignore-failed-read --files-from=-) | tar --extract --directory "$root/root/narrows" --no-same-owner
  else
    git clone --quiet --no-hardlinks "$checkout" "$root/root/narrows"
  fi
}

[[ -e $root/root/narrows ]] || {
  [[ -z $(ls -A "$root" 2>/dev/null) ]] || fail "$root is not empty and not from an earlier call; name another folder."
  bare_debian
}

# A fresh environment, with only what the network needs taken along.
environment=(HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "TERM=${TERM:-dumb}")
while read -r name; do
  case $name in
    PIP_FIND_LINKS | PIP_CERT) ;; # paths of this machine
    PIP_* | *_proxy | *_PROXY) environment+=("$name=${!name}") ;;
  esac
done < <(compgen -e)
if [[ -s $root/etc/outside-certificates.pem ]]; then
  for name in SSL_CERT_FILE PIP_CERT REQUESTS_CA_BUNDLE; do
    environment+=("$name=/etc/outside-certificates.pem")
  done
fi

# The mounts live in a namespace of their own and go with it, whatever happens.
start=$SECONDS
status=0
unshare --mount --pid --fork --kill-child --propagation private bash -euc '
  root=$1 target=$2
  shift 2
  mount -t proc proc "$root/proc"
  mount --rbind /sys "$root/sys"
  mount --rbind /dev "$root/dev"
  exec chroot "$root" env --ignore-environment "$@" make -C /root/narrows "$target"
' bare_debian_check "$root" "$target" "${environment[@]}" </dev/null || status=$?
echo "bare_debian_check: make $target ended with $status after $((SECONDS - start)) s"
exit "$status"
