#!/usr/bin/env bash
# PR #1434's wave 10 (F1-F10). TIDAL_WARMUP was not read there; it is here.
source "$(dirname "$0")/lib.sh"

question "Near the best point of wave 9, is anything left to find?"
base baseline TIDAL_LR=1 LOGIT_SOFTCAP=15 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 MATRIX_LR=0.10 \
  ENCODER_LAYERS=1

arm softcap13 "+0.002 there" LOGIT_SOFTCAP=13
arm softcap14 "+0.001 there" LOGIT_SOFTCAP=14
arm softcap16 "0.000 there" LOGIT_SOFTCAP=16
arm softcap17 "0.000 there" LOGIT_SOFTCAP=17
arm lr09 "+0.002 there" MATRIX_LR=0.09
arm lr11 "-0.002 there" MATRIX_LR=0.11
arm kv2 "cheaper attention, more steps in the time: -0.003 there" NUM_KV_HEADS=2
arm tidal30 "an earlier peak; never tried there" TIDAL_WARMUP=0.30
arm qk2 "a higher query gain: +0.004 there" QK_GAIN_INIT=2.0

control_every 10
seeds 1337 42 7
decide "nothing inside noise moves the base"
run_wave "$@"
