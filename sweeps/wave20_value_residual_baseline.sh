#!/usr/bin/env bash
# The value residual without repeats, value embeddings or XSA: is the gain of waves 16 and 19 its own?
source "$(dirname "$0")/lib.sh"

question "Does the value residual help the plain baseline, and for how long?"
base baseline
arm value_residual "values remember the first layer's" VALUE_RESIDUAL=1
arm value_embeds "token tables beside the stream" NUM_VALUE_EMBEDS=2

horizons 150 300 600
seeds 1337 42 7
decide "a gain that keeps its size at the longest run goes into best's CPU overlay"
run_wave "$@"
