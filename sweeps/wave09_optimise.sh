#!/usr/bin/env bash
# PR #1434's wave 9 (E1-E10).
source "$(dirname "$0")/lib.sh"

question "With one encoder layer, do softcap, rate, activation and query gain want to move again?"
base baseline TIDAL_LR=1 LOGIT_SOFTCAP=20 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 MATRIX_LR=0.08 \
  ENCODER_LAYERS=1

arm softcap15 "a lower cap: 0.000 there" LOGIT_SOFTCAP=15
arm softcap18 "between: +0.001 there" LOGIT_SOFTCAP=18
arm softcap12 "lower still: -0.001 there" LOGIT_SOFTCAP=12
arm lr10 "a higher Muon rate: +0.001 there" MATRIX_LR=0.10
arm lr12 "higher still: +0.001 there" MATRIX_LR=0.12
arm relu2 "was silu2 worth it? +0.003 there" MLP_ACT=relu2
arm qk2 "a higher query gain: +0.001 there" QK_GAIN_INIT=2.0
arm softcap15_lr10 "both: -0.003 there" LOGIT_SOFTCAP=15 MATRIX_LR=0.10
arm softcap15_qk2 "both: -0.001 there" LOGIT_SOFTCAP=15 QK_GAIN_INIT=2.0

control_every 10
seeds 1337 42 7
decide "nothing inside noise moves the base"
run_wave "$@"
