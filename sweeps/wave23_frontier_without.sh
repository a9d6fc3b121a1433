#!/usr/bin/env bash
# The other half of wave 22: the whole of #1855 at CPU size, less one part each time.
# Ended by steps, so that a busy machine changes nothing; scored by official windows alone, which is quick.
#
# bash sweeps/wave23_frontier_without.sh --threads 1
source "$(dirname "$0")/lib.sh"

question "Which parts of #1855 carry weight in the whole stack, on a small CPU model after 1,000 steps?"
base frontier ITERATIONS=1000 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 TRAIN_LOG_EVERY=50 DEVICE=cpu \
  EVAL_STRIDE=0 USE_HEDGE=0 EMA_DECAY=0
leave_one_out LN_SCALE ROPE_DIMS SKIP_GATES_ENABLED ORTHO_INIT QK_GAIN_INIT MLP_ACT XSA_LAST_N \
  MUON_ROW_NORMALIZE POLAR_EXPRESS MUON_WD EMBED_WD ADAM_WD BETA2 GRAD_CLIP_NORM MIN_LR \
  SPARSE_ATTN_GATE_ENABLED SMEAR_GATE_ENABLED PARALLEL_START_LAYER NUM_LOOPS PACK_DOCUMENTS

seeds 1337 42 7
decide "a part without which the stack is better beyond noise is left out of the CPU sizes; the GPU preset stays as published"
run_wave "$@"
