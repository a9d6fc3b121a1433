#!/usr/bin/env bash
# Waves 19 and 20 found gains that last. Do they add to the published stack, which `best` is, with seeds of their own?
source "$(dirname "$0")/lib.sh"

question "Do value embeddings, or the value residual, make the best preset better at 600 steps?"
base tidal_1434 ITERATIONS=600
arm value_embeds "token tables beside the stream: -0.05 on the baseline" NUM_VALUE_EMBEDS=2
arm value_residual "values remember the first layer's: -0.02 on the baseline" VALUE_RESIDUAL=1
arm both "what each gives, together" NUM_VALUE_EMBEDS=2 VALUE_RESIDUAL=1

seeds 301 302 303
decide "what is better over the wave and on held-out text goes into best's CPU overlay"
run_wave "$@"
