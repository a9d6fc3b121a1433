#!/usr/bin/env bash
# Does it train rightly and fast on this GPU? At most 9 minutes on one card; opt-in.
#     bash tests/gpu.sh [CHECK ...] [--official THE_OFFICIAL/train_gpt.py] [--json FILE] [--device cpu]
# Exit codes: 0 all checks that were made passed, 1 one failed, 2 no card here, none was made or wrong usage.
# `--device cpu` tries the checks themselves on a CPU, small, in some minutes; those that need a card are
# skipped and say so. It says nothing of a card.
set -euo pipefail
cd "$(dirname "$0")/.."
source sweeps/python_env.sh

use_python requirements.txt
exec "$PYTHON" tests/gpu_checks.py "$@"
