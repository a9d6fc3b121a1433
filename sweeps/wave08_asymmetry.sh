#!/usr/bin/env bash
# PR #1434's wave 8 (D1-D10). Differences "there" are against the mean of the base and its replicates.
source "$(dirname "$0")/lib.sh"

question "How many of the layers should feed the U-Net's skips?"
base baseline TIDAL_LR=1 LOGIT_SOFTCAP=20 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 MATRIX_LR=0.08

arm softcap18 "a lower cap: -0.002 there" LOGIT_SOFTCAP=18
arm softcap15 "a lower cap still: -0.003 there" LOGIT_SOFTCAP=15
arm encoder5 "one more than half of nine: +0.004 there" ENCODER_LAYERS=5
arm encoder3 "fewer: -0.009 there" ENCODER_LAYERS=3
arm encoder2 "fewer still: -0.011 there" ENCODER_LAYERS=2
arm encoder1 "one: -0.014 there" ENCODER_LAYERS=1
arm encoder3_softcap18 "both" ENCODER_LAYERS=3 LOGIT_SOFTCAP=18
arm encoder2_softcap18 "both" ENCODER_LAYERS=2 LOGIT_SOFTCAP=18

control_every 10
seeds 1337 42 7
decide "the trend over ENCODER_LAYERS, not its best point"
run_wave "$@"
