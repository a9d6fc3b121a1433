#!/usr/bin/env bash
# What wave 13 found too high in the published stack, on fresh seeds and at three lengths.
source "$(dirname "$0")/lib.sh"

question "Does the published stack want a lower Muon rate, and U-Net skips again, also in longer runs?"
base tidal_1434
arm lr04 "the baseline's rate: -0.054 in wave 13" MATRIX_LR=0.04
arm lr06 "between" MATRIX_LR=0.06
arm unet "half of the layers feed skips: -0.020 in wave 13" ENCODER_LAYERS=-1
arm lr04_unet "both" MATRIX_LR=0.04 ENCODER_LAYERS=-1
horizons 150 300 600

control_every 10
seeds 201 202 203
decide "what is better at the longest run and does not fade with length is tried at the size of run_best.sh"
run_wave "$@"
