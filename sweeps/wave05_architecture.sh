#!/usr/bin/env bash
# PR #1434's wave 5 (A1-A18). There EMBED_LR and HEAD_DIVERSITY did nothing; what they meant is left out here.
source "$(dirname "$0")/lib.sh"

question "Which activation, block order and head layout is better under Tidal, and does it hold under cosine?"
base baseline TIDAL_LR=1 LOGIT_SOFTCAP=20 ROPE_BASE=5000
cosine="TIDAL_LR=0 COSINE_LR=1 LOGIT_SOFTCAP=30 ROPE_BASE=10000"

arm cosine "the other schedule, with the default softcap and rotary base: +0.035 there" $cosine
arm leaky2 "lets negative inputs learn: +0.006 there" MLP_ACT=leaky_relu2
arm leaky2_cosine "the same on cosine: +0.002 there" $cosine MLP_ACT=leaky_relu2
arm swiglu "a gate is worth its two thirds of width: +0.003 there" MLP_ACT=swiglu
arm swiglu_cosine "the same on cosine: -0.006 there" $cosine MLP_ACT=swiglu
arm gelu2 "smooth at zero: +0.001 there" MLP_ACT=gelu2
arm silu2 "smooth and not monotonic: -0.002 there" MLP_ACT=silu2
arm parallel "one norm less, more steps in the time: -0.017 there" PARALLEL_BLOCK=1
arm parallel_cosine "the same on cosine: -0.025 there" $cosine PARALLEL_BLOCK=1
arm sandwich "a norm after attention steadies it: +0.022 there" SANDWICH_NORM=1
arm leaky2_parallel "both" MLP_ACT=leaky_relu2 PARALLEL_BLOCK=1
arm swiglu_parallel "both" MLP_ACT=swiglu PARALLEL_BLOCK=1
arm leaky2_lr06 "a higher Muon rate for few steps" MLP_ACT=leaky_relu2 MATRIX_LR=0.06
arm swiglu_lr06 "the same for the gate" MLP_ACT=swiglu MATRIX_LR=0.06
arm leaky2_parallel_lr06 "all three" MLP_ACT=leaky_relu2 PARALLEL_BLOCK=1 MATRIX_LR=0.06
arm leaky2_mlp3 "a wider MLP: +0.028 there, for want of steps" MLP_ACT=leaky_relu2 MLP_MULT=3
arm swiglu_wide "fewer, wider layers: +0.029 there" MLP_ACT=swiglu MODEL_DIM=576 NUM_LAYERS=8
arm leaky2_kv2 "fewer key/value heads are cheaper: -0.006 there" MLP_ACT=leaky_relu2 NUM_KV_HEADS=2
arm leaky2_kv1 "one is cheaper still: -0.008 there" MLP_ACT=leaky_relu2 NUM_KV_HEADS=1

control_every 10
seeds 1337 42 7
decide "the next base takes what is better under both schedules"
run_wave "$@"
