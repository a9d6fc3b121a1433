#!/usr/bin/env bash
# Is the same seed the same bits, the way people run it? Under 15 minutes on two idle cores; opt-in.
#     bash tests/as_users_run.sh [FAMILY ...] [--script OTHER/train_gpt.py]
# With Windows line ends bash cannot read this file; the next line is one that it can read even so.
[[ $(head -n 1 "$0") != *$'\r' ]] || { echo "error: $0 has Windows line ends (CRLF), which bash cannot read. In a clone without changes of your own: git rm -rq --cached . && git reset -q --hard; else: sed -i 's/\\r\$//' on its files" >&2; exit 2; }  #
set -euo pipefail
cd "$(dirname "$0")/.."
source sweeps/python_env.sh

use_python requirements.txt
exec "$PYTHON" tests/as_users_run.py "$@"
