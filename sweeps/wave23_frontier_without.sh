#!/usr/bin/env bash
# The other half of wave 22: the whole of #1855 at CPU size, less one group of parts each time.
# Ended by steps, so that a busy machine changes nothing; packed plainly and scored by official windows alone,
# which is quick.
#
# bash sweeps/wave23_frontier_without.sh --threads 1
source "$(dirname "$0")/lib.sh"

question "Which groups of parts carry weight in the whole of #1855, on a small CPU model after 1,000 steps?"
base frontier NUM_LAYERS=4 MODEL_DIM=96 ROPE_DIMS=6 PARALLEL_START_LAYER=2 LOOP_START=1 LOOP_END=1 TRAIN_SEQ_LEN=256 \
  TRAIN_BATCH_TOKENS=2048 ITERATIONS=1000 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 VAL_LOSS_EVERY=0 \
  TRAIN_LOG_EVERY=50 DTYPE=fp32 DEVICE=cpu EMA_DECAY=0 EVAL_STRIDE=0 EVAL_DOC_ISOLATED=0 TTT_STEPS=0 USE_HEDGE=0 \
  GPTQ_CALIBRATION_BATCHES=0 GPTQ_RESERVE_SECONDS=0 SIZE_TARGET=0

arm no_model "the model's small parts" LN_SCALE=0 ROPE_DIMS=0 SKIP_GATES_ENABLED=0 ORTHO_INIT=0
arm no_optimiser "the optimiser's small parts" MUON_ROW_NORMALIZE=0 POLAR_EXPRESS=0 BETA2=0.95
arm no_gates "the gates" SPARSE_ATTN_GATE_ENABLED=0 SPARSE_ATTN_GATE_SCALE=1 SMEAR_GATE_ENABLED=0
arm no_loop "the loop" NUM_LOOPS=0 LOOP_START=3 LOOP_END=5
arm no_lanes "the lanes" PARALLEL_START_LAYER=0
arm no_decays "weight decay" MUON_WD=0 EMBED_WD=0 ADAM_WD=0
arm no_packing "packed documents" PACK_DOCUMENTS=0
arm no_xsa "values without the token's own" XSA_LAST_N=0
arm official_rates "the rates and the floor" MATRIX_LR=0.04 SCALAR_LR=0.04 TIED_EMBED_LR=0.05 MIN_LR=0 WARMDOWN_FRAC=0.5

seeds 1337 42 7
decide "a group without which the stack is better beyond noise is left out of the CPU sizes; the GPU preset stays as published"
run_wave "$@"
