"""Where the project's files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ROOT / "sweeps"
PRESETS = SWEEPS / "presets"
# What came with the project. Nothing is written there unless somebody asks for it.
SHIPPED_RESULTS = SWEEPS / "results"
SHIPPED_FIGURES = SWEEPS / "figures"
# What is made here; git does not see it.
OWN_RUNS = ROOT / "runs/waves"
OWN_RESULTS = ROOT / "runs/results"
OWN_PAGE = ROOT / "runs/report.html"
