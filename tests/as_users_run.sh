#!/usr/bin/env bash
# Is the same seed the same bits, the way people run it? Under 15 minutes on two idle cores; opt-in.
#     bash tests/as_users_run.sh [FAMILY ...] [--script OTHER/train_gpt.py]
set -euo pipefail
cd "$(dirname "$0")/.."
source sweeps/python_env.sh

use_python requirements.txt
exec "$PYTHON" tests/as_users_run.py "$@"
