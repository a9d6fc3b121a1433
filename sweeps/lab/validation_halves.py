"""The data of a wave. For selection and report, a dataset's validation text is cut in two halves: arms are
chosen on the first, finalists are scored once on the second, which no choice has seen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from data.shards import read_tokens, write_shard

HALF_TOKENS = 32_768  # 3 s of one core at proxy sizes
SELECTION, HELD_OUT = "selection", "held_out"


def cut(source: Path, out: Path, tokens: int) -> Path:
    """The folder OUT/data/NAME-ID with two datasets, `selection` and `held_out`: the training shards of
    `source`, by links, and its first and second `tokens` validation tokens, or halves of a shorter text."""
    source = source.resolve()
    shards = sorted(path for path in source.glob("*.bin") if path.name[0] != ".")  # macOS leaves "._x.bin"
    about = [[path.name, path.stat().st_size] for path in shards]
    key = hashlib.sha256(json.dumps([str(source), about, tokens]).encode()).hexdigest()[:8]
    folder = out / "data" / f"{source.name}-{key}"
    if folder.is_dir():
        return folder
    text = np.concatenate([read_tokens(path) for path in shards if "_val_" in path.name])
    half = min(tokens, len(text) // 2)
    scratch = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    for place, name in enumerate((SELECTION, HELD_OUT)):
        (scratch / name).mkdir(parents=True)
        write_shard(scratch / name / "wave_val_000000.bin", text[place * half : (place + 1) * half])
        for path in shards:
            if "_train_" in path.name:
                (scratch / name / path.name).symlink_to(path)
    try:
        scratch.rename(folder)
    except OSError:  # another engine was faster
        shutil.rmtree(scratch)
    return folder
