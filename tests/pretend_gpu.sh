#!/usr/bin/env bash
# What CUDA code can show without a card:   bash tests/pretend_gpu.sh [CARD ...] [--presets NAME,...] [--write]
# CARD: compute capabilities (default 9.0 8.9 8.0 7.5: H100, L4, A100, T4). --write keeps the bytes moved in
# records/benchmarks/pretend_gpu.json, which later runs must meet within 2 %. What it checks and what it cannot:
# tests/pretend_gpu/README.md. Needs Linux, gcc and 5 GB in PRETEND_GPU (default ~/.cache/parameter-golf-pretend-gpu),
# where it installs torch's CUDA build of its own. Opt-in: about 2 minutes for a preset and card on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
export PRETEND_GPU=${PRETEND_GPU:-$HOME/.cache/parameter-golf-pretend-gpu}
here=tests/pretend_gpu python=$PRETEND_GPU/venv/bin/python

if [[ ! -e $PRETEND_GPU/installed ]]; then
  echo "pretend_gpu.sh: installs torch's CUDA build into $PRETEND_GPU, once (5 GB, minutes)"
  mkdir -p "$PRETEND_GPU"
  python3 -m venv "$PRETEND_GPU/venv"
  # === and no other place to look: a local +cpu build would be preferred to the CUDA build of that version.
  PIP_FIND_LINKS='' PIP_EXTRA_INDEX_URL='' "$python" -m pip install -q --disable-pip-version-check \
    'torch===2.13.0' 'numpy==2.4.6' 'sentencepiece==0.2.3' 'zstandard==0.25.0'
  touch "$PRETEND_GPU/installed"
fi
headers=$(dirname "$(find "$PRETEND_GPU/venv/" -path '*nvidia/cu*/vector_types.h' | head -n 1)")
gcc -shared -fPIC -O1 -w -I"$here/include" -I"$headers" "$here/cuda_runtime.c" -o "$PRETEND_GPU/libpretend_cudart.so"
gcc -shared -fPIC -O1 -w -Wl,-soname,libcuda.so.1 "$here/cuda_driver.c" -o "$PRETEND_GPU/libcuda.so.1"
TRITON_INTERPRET=1 "$python" tests/support/fused_mlp_values.py
exec env PYTHONPATH=. "$python" "$here/run.py" "$@"
