#!/usr/bin/env bash
source "$(dirname "$0")/lib.sh"

question "Which effects keep their sign as the run gets longer?"
base baseline
arm tidal "a rise and a long fall" TIDAL_LR=1
arm lr11 "a high Muon rate" MATRIX_LR=0.11
arm lr02 "half the Muon rate" MATRIX_LR=0.02
arm parallel "one norm less" PARALLEL_BLOCK=1
arm encoder0 "no skips" ENCODER_LAYERS=0
arm untied "a head of its own" TIE_EMBEDDINGS=0 EMBED_LR=0.8
horizons 75 150 300

control_every 10
seeds 1337 42 7
decide "an effect that changes its sign is not carried to a longer run"
run_wave "$@"
