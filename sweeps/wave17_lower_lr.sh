#!/usr/bin/env bash
# The sweep of the LowerLR record: "there", differences of its table from MATRIX_LR=0.04. Its script had an
# undeclared warm-up of 200 steps, which nothing here has.
source "$(dirname "$0")/lib.sh"

question "Is half the baseline's learning rate better after 300 steps?"
base baseline ITERATIONS=300
arm lr01 "a quarter of the Muon rate; not tried there" MATRIX_LR=0.01
arm lr015 "too low: -0.005 there" MATRIX_LR=0.015
arm lr02 "half: -0.006 there, the record's" MATRIX_LR=0.02
arm lr03 "between: -0.001 there" MATRIX_LR=0.03
arm lr06 "too high: +0.016 there" MATRIX_LR=0.06
arm half "the record's line: every rate halved" MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03

control_every 10
seeds 101 102 103
decide "half the rate holds here if it is better beyond noise; the records have 1,000 steps"
run_wave "$@"
