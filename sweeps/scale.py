"""Milliseconds a step on 1 to 32 GPUs, on paper: python sweeps/scale.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.user_error import run_tool  # noqa: E402
from sweeps.lab.gpu_scaling import main  # noqa: E402

if __name__ == "__main__":
    run_tool(main)
