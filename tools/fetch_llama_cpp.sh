#!/usr/bin/env bash
# Gets the pinned llama.cpp source out of the PyPI source package llama-cpp-python and prints its folder on stdout
# (messages go to stderr). A second call only prints. The folder appears whole or not at all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cache_dir.sh"

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
folder=$narrows_cache/llama.cpp-$version

if [[ ! -e $folder/CMakeLists.txt ]]; then
  need_pip
  mkdir -p "$narrows_cache"
  work=$(mktemp -d "$narrows_cache/fetch.XXXXXX")
  trap 'rm -rf "$work"' EXIT

  echo "fetch_llama_cpp: downloading llama.cpp's source (llama-cpp-python $version, 77 MB)" >&2
  # pip checks the hash itself: it runs the package's build backend for its metadata, which must not happen first.
  echo "llama-cpp-python==$version --hash=sha256:$sha256" >"$work/requirements.txt"
  python3 -m pip download --quiet --no-cache-dir --no-deps --no-binary llama-cpp-python --dest "$work" \
    --requirement "$work/requirements.txt" >&2 ||
    die "llama-cpp-python $version did not arrive as the file with sha256 $sha256 (pip says above why); nothing was kept."
  sdist=$work/llama_cpp_python-$version.tar.gz

  mkdir "$work/tree"
  tar --extract --gzip --file "$sdist" --directory "$work/tree" --strip-components=3 --no-same-owner \
    "llama_cpp_python-$version/vendor/llama.cpp"
  # Another fetch may have finished first; its tree is the same.
  mv --no-target-directory "$work/tree" "$folder" 2>/dev/null || [[ -e $folder/CMakeLists.txt ]] ||
    die "could not move llama.cpp's source to $folder; remove that folder and try again."
fi
echo "$folder"
