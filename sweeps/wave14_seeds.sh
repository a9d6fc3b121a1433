#!/usr/bin/env bash
source "$(dirname "$0")/lib.sh"

question "Does the published stack beat the official baseline, and by how much, over fresh seeds?"
base baseline
arm tidal_1434 "the whole stack: -0.091 there, one seed" TIDAL_LR=1 LOGIT_SOFTCAP=15 ROPE_BASE=5000 \
  PARALLEL_BLOCK=1 MLP_ACT=silu2 MATRIX_LR=0.11 ENCODER_LAYERS=0 NUM_KV_HEADS=2 TIE_EMBEDDINGS=0 EMBED_LR=0.8
arm lower_lr "half of every learning rate, the LowerLR record" MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03

control_every 10
seeds 101 102 103 104 105
decide "five fresh seeds, none of them used to choose anything"
run_wave "$@"
