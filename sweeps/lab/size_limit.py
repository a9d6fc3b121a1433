"""The challenge's limit for code and packed model, in bytes, as train_gpt.py declares it.

The number is read from the text of the script: importing it would import torch, for a table of a few lines.
"""

import re

from sweeps.lab.paths import ROOT


def read_size_limit() -> int:
    """Decimal bytes of code and packed model together."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    return int(re.search(r"^SIZE_LIMIT\b[^=]*= *([\d_]+)", source, re.M)[1])


SIZE_LIMIT = read_size_limit()
