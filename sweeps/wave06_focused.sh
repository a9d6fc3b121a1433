#!/usr/bin/env bash
# PR #1434's wave 6 (B1-B5).
source "$(dirname "$0")/lib.sh"

question "With parallel blocks, what do a higher rate, more layers, silu2 and a higher query gain add?"
base baseline TIDAL_LR=1 LOGIT_SOFTCAP=20 ROPE_BASE=5000 PARALLEL_BLOCK=1

arm lr06 "few steps want a higher Muon rate: -0.004 there" MATRIX_LR=0.06
arm layers10 "depth against steps: +0.038 there" NUM_LAYERS=10
arm layers10_lr06 "the same with the higher rate: +0.028 there" NUM_LAYERS=10 MATRIX_LR=0.06
arm silu2_lr06 "the best of wave 5 with the higher rate: -0.007 there" MLP_ACT=silu2 MATRIX_LR=0.06
arm qk2_lr06 "sharper attention from the start: -0.006 there" QK_GAIN_INIT=2.0 MATRIX_LR=0.06

control_every 10
seeds 1337 42 7
decide "the best arm beyond noise is the base of wave 7"
run_wave "$@"
