"""What waves found, as tables, figures and one offline page: python sweeps/report.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.user_error import run_tool  # noqa: E402
from sweeps.lab.report import main  # noqa: E402

if __name__ == "__main__":
    try:
        run_tool(main)
    except KeyboardInterrupt:
        sys.exit(130)
