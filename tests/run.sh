#!/usr/bin/env bash
# Lint, format check and tests; sets up what they need.   bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
source sweeps/python_env.sh

use_python requirements.txt requirements-lab.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -q -n 2 --dist loadfile "$@"
