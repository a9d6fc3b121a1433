"""Runs a wave whose words sweeps/lib.sh has collected, from any folder: bash sweeps/WAVE.sh --help"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.user_error import run_tool  # noqa: E402
from sweeps.lab.wave_engine import main  # noqa: E402

if __name__ == "__main__":
    run_tool(partial(main, sys.argv[1:]))
