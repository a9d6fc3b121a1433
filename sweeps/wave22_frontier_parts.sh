#!/usr/bin/env bash
# Each part of the records #1394, #1493 and #1855 alone, on a model that is near the best of its size and clock:
# 4 x 128 with XSA and the value residual scored best of fourteen sizes in 120 s of one core.
# Ended by steps, so that a busy machine changes nothing. Where a part scales with the layers it is scaled:
# lanes and parallel residuals from the last three, the loop over the second of four.
#
# bash sweeps/wave22_frontier_parts.sh --threads 1
source "$(dirname "$0")/lib.sh"

question "Which parts of the later records make a small CPU model better after 1,000 steps, each alone?"
base baseline NUM_LAYERS=4 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 XSA_LAST_N=4 VALUE_RESIDUAL=1 \
  TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=4096 ITERATIONS=1000 WARMDOWN_FRAC=0.5 \
  MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=50 DATA_SHUFFLE=1 DEVICE=cpu

# The model.
arm ln_scale "deeper blocks add less: -0.002 with partial rotation there" LN_SCALE=1
arm rope_dims "three quarters of a head see content alone" ROPE_DIMS=8
arm skip_gates "a skip is blended, half and half at first" SKIP_GATES_ENABLED=1
arm ortho_init "orthogonal starts learn faster at first" ORTHO_INIT=1

# The optimiser.
arm row_norm "rows of equal size before they are orthogonalised: -0.001 there" MUON_ROW_NORMALIZE=1
arm polar_express "other coefficients: -0.0005 there" POLAR_EXPRESS=1
arm decays "weight decay pays at 5,000 steps there: nothing here" MUON_WD=0.095 EMBED_WD=0.085 ADAM_WD=0.02
arm cautious_wd "it pulls only what the update makes smaller: better than decays" \
  MUON_WD=0.095 EMBED_WD=0.085 ADAM_WD=0.02 CAUTIOUS_WD=1
arm beta2 "a longer second moment for embeddings and gains" BETA2=0.99
arm normuon "rows of the update by their own second moments" MUON_BETA2=0.95
arm soap_muon "the update scaled in the eigenbasis of its covariance" SOAP_BETA2=0.9

# Gates, lanes and the loop.
arm attn_gate "each head has a gate, half open at first" SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5
arm smear_gate "a free bigram: worth more where the vocabulary is small" SMEAR_GATE_ENABLED=1
arm bigram_hash "a row for each pair of tokens: the records down to 1.1 had it" BIGRAM_VOCAB_SIZE=2048
arm loop "one block twice more from progress 0.35: costs half as much again" NUM_LOOPS=2 LOOP_START=1 LOOP_END=1
arm lanes "attention and MLP with streams of their own after the encoder" PARALLEL_START_LAYER=2
arm parallel "attention and MLP of the same input in the last three blocks" PARALLEL_RESIDUAL_START=1

seeds 1337 42 7
decide "a part that is better beyond noise goes into the CPU sizes of the frontier presets; what is inside it stays as published"
run_wave "$@"
