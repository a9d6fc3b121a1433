#!/usr/bin/env bash
# PR #1434's wave 12 (H1-H6).
source "$(dirname "$0")/lib.sh"

question "From the best stack, do no skips at all, a wider MLP or weight decay go further?"
base baseline TIDAL_LR=1 LOGIT_SOFTCAP=15 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 MATRIX_LR=0.11 \
  ENCODER_LAYERS=1 NUM_KV_HEADS=2 TIE_EMBEDDINGS=0 EMBED_LR=0.8

arm encoder0 "no skips: -0.001 there, the published best" ENCODER_LAYERS=0
arm mlp3 "a wider MLP: +0.027 there, for want of steps" MLP_MULT=3
arm encoder0_mlp3 "both" ENCODER_LAYERS=0 MLP_MULT=3
arm decay "+0.136 there" WD_SCHEDULE=0.04
arm encoder0_mlp3_decay "all three" ENCODER_LAYERS=0 MLP_MULT=3 WD_SCHEDULE=0.04

control_every 10
seeds 1337 42 7
decide "the best stack is what the leave-one-out of wave 13 takes apart"
run_wave "$@"
