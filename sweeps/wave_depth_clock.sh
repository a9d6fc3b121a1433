#!/usr/bin/env bash
# Progressive against fixed depth under one clock. A clocked run wants a quiet machine: one run at a time.
#
# bash sweeps/wave_depth_clock.sh --jobs 1
# python -m sweeps.lab.depth_switches runs/waves/wave_depth_clock/*/logs/*.jsonl    what each switch cost
source "$(dirname "$0")/lib.sh"

question "Does it pay, under one clock, to train shallow first and deep last?"
base progressive_depth PROG_DEPTH= MAX_WALLCLOCK_SECONDS=150 TRAIN_LOG_EVERY=1 EVAL_STRIDE=0 \
  SWA_ENABLED=1 SWA_EVERY=2
arm progressive "more steps in the same time, and most of them shallow" PROG_DEPTH=0.4:2,0.65:3,1.0:4

seeds 1337 42 7
decide "progressive depth pays if its packed bpb is lower beyond noise"
run_wave "$@"
