#!/usr/bin/env bash
# PR #1434's wave 7 (C1-C14). Its EMBED_LR did nothing while tied, so TIED_EMBED_LR stands in; its HEAD_DIVERSITY
# did nothing either, here it acts. Differences "there" are against the mean of the base and its replicates.
source "$(dirname "$0")/lib.sh"

question "Around parallel silu2 blocks, where do softcap, rotary base, rates and heads want to be?"
base baseline TIDAL_LR=1 LOGIT_SOFTCAP=20 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 MATRIX_LR=0.06

arm kv1_plain "one key/value head, relu2, the default rate" NUM_KV_HEADS=1 MLP_ACT=relu2 MATRIX_LR=0.04
arm kv1 "one key/value head: -0.001 there" NUM_KV_HEADS=1
arm kv1_heads16 "more, smaller heads: +0.051 there" NUM_KV_HEADS=1 NUM_HEADS=16
arm softcap15 "a lower cap: -0.002 there" LOGIT_SOFTCAP=15
arm softcap18 "between: -0.002 there" LOGIT_SOFTCAP=18
arm softcap25 "a higher cap: +0.006 there" LOGIT_SOFTCAP=25
arm rope3000 "shorter wavelengths: +0.001 there" ROPE_BASE=3000
arm rope7500 "longer wavelengths: 0.000 there" ROPE_BASE=7500
arm embed_lr "a faster embedding: a quarter up" TIED_EMBED_LR=0.0625
arm lr08 "a higher Muon rate still: -0.002 there" MATRIX_LR=0.08
arm lr08_embed_lr "both rates" MATRIX_LR=0.08 TIED_EMBED_LR=0.0625
arm breathing "hold the peak: +0.014 there" TIDAL_LR=0 BREATHING_LR=1
arm diversity "heads that differ, strongly" HEAD_DIVERSITY=0.001
arm diversity_weak "heads that differ, as there" HEAD_DIVERSITY=0.0001

control_every 10
seeds 1337 42 7
decide "softcap and rate by their trend, the rest beyond noise only"
run_wave "$@"
