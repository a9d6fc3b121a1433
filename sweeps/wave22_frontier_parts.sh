#!/usr/bin/env bash
# The groups of parts that the records #1394, #1493 and #1855 added, each alone, on a small model near the best
# of its size: XSA and the value residual in every layer carried 4 x 128 past thirteen other sizes in 120 s.
# Ended by steps, so that a busy machine changes nothing. Where a part scales with the layers it is scaled:
# lanes from the last two, the loop over the second of four. float32, in which the field's losses were matched.
#
# bash sweeps/wave22_frontier_parts.sh --threads 1                          the embedded corpus
# bash sweeps/wave22_frontier_parts.sh --threads 1 --data DIR --tokenizer MODEL    another text
source "$(dirname "$0")/lib.sh"

question "Which parts of the later records make a small CPU model better after 1,000 steps, each group alone?"
base baseline NUM_LAYERS=4 MODEL_DIM=96 NUM_HEADS=4 NUM_KV_HEADS=2 XSA_LAST_N=4 VALUE_RESIDUAL=1 \
  TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=2048 ITERATIONS=1000 WARMDOWN_FRAC=0.5 DTYPE=fp32 \
  MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=50 DATA_SHUFFLE=1 DEVICE=cpu

arm model "partial rotation, smaller deep blocks, blended skips, orthogonal starts: -0.002 and more there" \
  LN_SCALE=1 ROPE_DIMS=6 SKIP_GATES_ENABLED=1 ORTHO_INIT=1
arm optimiser "rows of equal size, Polar Express, a longer second moment: -0.0015 there" \
  MUON_ROW_NORMALIZE=1 POLAR_EXPRESS=1 BETA2=0.99
arm gates "heads with gates and a free bigram: worth more where the vocabulary is small" \
  SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5 SMEAR_GATE_ENABLED=1
arm loop "one block twice more from progress 0.35: costs half as much again" NUM_LOOPS=2 LOOP_START=1 LOOP_END=1
arm lanes "attention and MLP with streams of their own after the encoder" PARALLEL_START_LAYER=2
arm decays "weight decay pays at 5,000 steps there: nothing here" MUON_WD=0.095 EMBED_WD=0.085 ADAM_WD=0.02
arm normuon "rows of the update by their own second moments" MUON_BETA2=0.95
arm bigram_hash "a row for each pair of tokens: the records down to 1.1 had it" BIGRAM_VOCAB_SIZE=2048

seeds 1337 42 7
decide "a group that is better beyond noise goes into the CPU sizes of the frontier presets; what is inside it stays as published"
run_wave "$@"
