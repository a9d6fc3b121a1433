#!/usr/bin/env bash
# The residual stream of a bf16 model is bf16 here; under autocast the official one is float32 where torch counts
# rms_norm among the float32 functions. What does the rounding cost?
#
# bash sweeps/wave24_residual_dtype.sh --threads 1
source "$(dirname "$0")/lib.sh"

question "Does a float32 residual stream make a bf16 model better after 500 steps?"
base baseline NUM_LAYERS=4 MODEL_DIM=96 NUM_HEADS=4 NUM_KV_HEADS=2 XSA_LAST_N=4 VALUE_RESIDUAL=1 \
  TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=2048 ITERATIONS=500 WARMDOWN_FRAC=0.5 DTYPE=bf16 \
  MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=50 DATA_SHUFFLE=1 DEVICE=cpu
arm residual_fp32 "each block adds to the stream without rounding it" RESIDUAL_FP32=1

seeds 1337 42 7 11 23
decide "if it is better beyond noise the frontier presets get it; else bf16 stays for its speed"
run_wave "$@"
