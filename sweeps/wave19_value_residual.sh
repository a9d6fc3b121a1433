#!/usr/bin/env bash
# What wave 16 turned up: two verdicts of PR #895 the other way round. Its 200 steps lie between these lengths.
source "$(dirname "$0")/lib.sh"

question "Do the value residual, and no skip across repeats, hold their gains when the run is shorter or longer?"
base progressive_depth PROG_DEPTH= EVAL_STRIDE=0 USE_HEDGE=0 SWA_ENABLED=0
arm value_residual "values remember the first layer's: lost there, -0.047 here" VALUE_RESIDUAL=1
arm no_cross_repeat "a repeat does not see the one before: -0.016 here" CROSS_REPEAT_SKIP=0

horizons 100 400
seeds 1337 42 7
decide "a gain that keeps its size at the longest run is worth a try at scale"
run_wave "$@"
