#!/usr/bin/env bash
# PR #1434's wave 11 (G1, G3). There untying also changed the embedding's rate and start; so it does here.
source "$(dirname "$0")/lib.sh"

question "Does an output head of its own pay, and does weight decay that grows with progress?"
base baseline TIDAL_LR=1 LOGIT_SOFTCAP=15 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 MATRIX_LR=0.11 \
  ENCODER_LAYERS=1

arm untied "a head of its own, embedding at its published rate: -0.013 there" TIE_EMBEDDINGS=0 EMBED_LR=0.8
arm decay "decay without the learning rate was too strong there: +0.026" WD_SCHEDULE=0.01

control_every 10
seeds 1337 42 7
decide "untied becomes the base if it is better beyond noise"
run_wave "$@"
