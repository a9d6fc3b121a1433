"""Where the project's files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ROOT / "sweeps"
PRESETS = SWEEPS / "presets"
RESULTS = SWEEPS / "results"
FIGURES = SWEEPS / "figures"
