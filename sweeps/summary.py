"""Print one run as a short table, from its event log: python sweeps/summary.py logs/RUN_ID.jsonl"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.user_error import run_tool  # noqa: E402
from sweeps.lab.run_summary import main  # noqa: E402

if __name__ == "__main__":
    run_tool(main)
