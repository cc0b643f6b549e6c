#!/usr/bin/env bash
# server_tests.sh PROGRAM MODEL [pytest's arguments]: the Python tests of `narrows serve`, in a venv in the cache folder. Without the
# packages (no python3-venv, no network the first time) it says so and exits with 77, which CTest counts as skipped.
# NARROWS_TEST_REQUIREMENTS, NARROWS_TEST_FILE: another list of packages, one file of tests/server (client_tests.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cache_dir.sh"
tests=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tests/server" && pwd)

skip() {
  echo "server_tests: $*; the Python tests of the server are skipped." >&2
  exit 77
}

(($# >= 2)) || die "usage: server_tests.sh PROGRAM MODEL [pytest's arguments]"
[[ -x $1 ]] || die "$1 is not there; build it first."
[[ -f $2 ]] || skip "the model $2 is not there (make model)"
requirements=$tests/${NARROWS_TEST_REQUIREMENTS:-requirements.txt}
export NARROWS_PROGRAM=$1 NARROWS_MODEL=$2
shift 2

venv=$narrows_cache/server-tests-$(cat "$requirements" <(python3 --version) | sha256sum | cut -c 1-12)
if [[ ! -e $venv/complete ]]; then
  mkdir -p "$narrows_cache"
  exec 9>"$venv.lock"
  flock 9 # two runs at once make one venv
  if [[ ! -e $venv/complete ]]; then
    rm -rf "$venv"
    python3 -m venv "$venv" >&2 || skip "python3 cannot make a venv (Debian: python3-venv)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 2 --timeout 20 \
      -r "$requirements" >&2 || skip "pip could not install $(grep -v '^#' "$requirements" | tr '\n' ' ')"
    touch "$venv/complete"
  fi
  exec 9>&-
fi
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider "$tests/${NARROWS_TEST_FILE:-}" "$@"
