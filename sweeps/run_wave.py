"""Runs a wave whose words sweeps/lib.sh has collected, from any folder: bash sweeps/WAVE.sh --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sweeps.lab.wave_engine import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
