#!/usr/bin/env bash
# llama_suite.sh PROGRAM MODEL [pytest's arguments]: the server tests of the pinned llama.cpp, out of its source in the cache
# folder, against `narrows serve`, by tests/server/llama_suite.py. docs/llama_suite.md says what fails and why. Not part of
# `make test`: it takes some minutes and a model that `make model-qwen` fetches.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/cache_dir.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
(($# >= 2)) || die "usage: llama_suite.sh PROGRAM MODEL [pytest's arguments]"
NARROWS_PROGRAM=$(realpath "$1") NARROWS_MODEL=$(realpath -s "$2")
NARROWS_LLAMA_SUITE=$("$root/tools/fetch_llama_cpp.sh")/tools/server/tests
export NARROWS_PROGRAM NARROWS_MODEL NARROWS_LLAMA_SUITE NARROWS_LLAMA_LIST=$root/docs/llama_suite.md
shift 2
venv=$narrows_cache/llama-suite-$(cat "$root/tests/server/requirements_llama_suite.txt" <(python3 --version) | sha256sum | cut -c 1-12)
if [[ ! -e $venv/complete ]]; then
  rm -rf "$venv"
  python3 -m venv "$venv" || die "python3 cannot make a venv (Debian: python3-venv)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/tests/server/requirements_llama_suite.txt"
  touch "$venv/complete"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" # what the tests write goes here
files=()
for name in basic chat_completion compat_anthropic compat_oai_responses completion ctx_shift embedding ignore_eos infill security \
  slot_save stream template tokenize tool_call; do
  files+=("$NARROWS_LLAMA_SUITE/unit/test_$name.py")
done
(($# == 0)) || files=()
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$root/tests/server "$venv/bin/python" -m pytest -p llama_suite -p no:cacheprovider -q \
  -c /dev/null --rootdir "$NARROWS_LLAMA_SUITE" --timeout 120 -m "not slow" --tb=short "${files[@]}" "$@"
