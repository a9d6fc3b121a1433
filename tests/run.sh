#!/usr/bin/env bash
# Lint, format check and tests; sets up what they need.   bash tests/run.sh [fast|slow] [PYTEST ARGUMENTS]
# fast: only the tests that take no training run, in under a minute on two idle cores.
# slow: only those that are left out otherwise, since others show the same.
# With Windows line ends bash cannot read this file; the next line is one that it can read even so.
[[ $(head -n 1 "$0") != *$'\r' ]] || { echo "error: $0 has Windows line ends (CRLF), which bash cannot read. In a clone without changes of your own: git rm -rq --cached . && git reset -q --hard; else: sed -i 's/\\r\$//' on its files" >&2; exit 2; }  #
set -euo pipefail
cd "$(dirname "$0")/.."
source sweeps/python_env.sh

if [[ ${1-} == fast || ${1-} == slow ]]; then set -- -m "$@"; fi
use_python requirements.txt requirements-lab.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# A worker that crashes fails its test and ends the run: with --dist loadfile, pytest-xdist 3.8.0 never ends
# after it has put another worker in its place.
"$PYTHON" -m pytest -q -n 2 --max-worker-restart=0 --dist loadfile --no-loadscope-reorder "$@"
