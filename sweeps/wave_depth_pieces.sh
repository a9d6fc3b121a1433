#!/usr/bin/env bash
# PR #895's whole stack at fixed depth, three blocks three times; each arm takes one piece away or adds one.
#
# bash sweeps/wave_depth_pieces.sh --jobs 2 --val-tokens 65536
#
# Its learning rates were tuned for thousands of steps, so they are the baseline's here.
source "$(dirname "$0")/lib.sh"

question "What does each piece of the depth recurrence of PR #895 give, at equal steps?"
base baseline MODEL_DIM=96 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=2048 \
  MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=0 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=40 DATA_SHUFFLE=1 \
  DEVICE=cpu DTYPE=fp32 COMPILE=0 \
  NUM_LAYERS=3 NUM_REPEATS=3 NUM_VALUE_EMBEDS=2 XSA_LAST_N=3 MLP_ACT=leaky_relu2 LEAKY_SLOPE=0.5 \
  MUON_WD=0.04 GRAD_CLIP_NORM=0.3 WARMDOWN_FRAC=0.3 ITERATIONS=240

arm null_beta2 "too small a change to matter: it shows the noise" BETA2=0.950001
arm swa "the mean of late snapshots" SWA_ENABLED=1 SWA_EVERY=4
arm ema95 "an exponential mean, short" EMA_DECAY=0.95
arm ema98 "an exponential mean, longer" EMA_DECAY=0.98
arm no_xsa "heads may keep their own value" XSA_LAST_N=0
arm xsa_everywhere "no head keeps its own value, in all layers" XSA_LAST_N=-1
arm relu2 "the baseline's activation" MLP_ACT=relu2 LEAKY_SLOPE=0.01
arm no_value_embeds "no token tables beside the stream" NUM_VALUE_EMBEDS=0
arm no_cross_repeat "a repeat does not see the one before" CROSS_REPEAT_SKIP=0
arm value_residual "values remember the first layer's: lost there" VALUE_RESIDUAL=1
arm repeat_lora "each repeat has a small change of its own: lost there" REPEAT_LORA_RANK=2
arm no_decay "no weight decay" MUON_WD=0
arm no_clip "no gradient clip" GRAD_CLIP_NORM=0
arm progressive "shallow first, deep last, at equal steps" PROG_DEPTH=0.4:1,0.65:2,1.0:3
arm repeats1 "three blocks, once" NUM_REPEATS=1
arm nine_blocks "nine blocks of their own instead of three that run three times" NUM_LAYERS=9 NUM_REPEATS=1 ENCODER_LAYERS=0

control_every 10
seeds 1337 42 7
decide "a piece inside noise is not load-bearing at this scale"
run_wave "$@"
