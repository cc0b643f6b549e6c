#!/usr/bin/env bash
# client_tests.sh PROGRAM MODEL: tests/server/test_clients.py, with the packages that it is about. aider pins a hundred others
# to one version each, so it has a venv of its own. Not part of `make test`: fetching them takes minutes.
set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NARROWS_TEST_FILE=test_clients.py
NARROWS_TEST_REQUIREMENTS=requirements_clients.txt "$tools/server_tests.sh" "$@" -k "not aider" --disable-warnings
NARROWS_TEST_REQUIREMENTS=requirements_aider.txt "$tools/server_tests.sh" "$@" -k aider --disable-warnings
