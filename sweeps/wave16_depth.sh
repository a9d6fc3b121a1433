#!/usr/bin/env bash
# PR #895's stack, one piece away or added at a time.
source "$(dirname "$0")/lib.sh"

question "What does each piece of the depth recurrence of PR #895 give?"
base progressive_depth PROG_DEPTH= EVAL_STRIDE=0 USE_HEDGE=0 SWA_ENABLED=0
arm progressive "shallow first, deep last: more steps in the time" PROG_DEPTH=0.4:2,0.65:3,1.0:4
arm swa "the mean of late snapshots" SWA_ENABLED=1 SWA_EVERY=5
arm no_xsa "heads may keep their own value" XSA_LAST_N=0
arm no_value_embeds "no token tables beside the stream" NUM_VALUE_EMBEDS=0
arm no_cross_repeat "a repeat does not see the one before" CROSS_REPEAT_SKIP=0
arm value_residual "values remember the first layer's: lost there" VALUE_RESIDUAL=1
arm repeat_lora "each repeat has a small change of its own: lost there" REPEAT_LORA_RANK=2
arm no_decay "no weight decay" MUON_WD=0
arm no_clip "no gradient clip" GRAD_CLIP_NORM=0
arm repeats3 "one repeat fewer" NUM_REPEATS=3
arm repeats1 "three blocks, once" NUM_REPEATS=1

control_every 10
seeds 1337 42 7
decide "a piece inside noise is not load-bearing at this scale"
run_wave "$@"
