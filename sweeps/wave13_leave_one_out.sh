#!/usr/bin/env bash
source "$(dirname "$0")/lib.sh"

question "Which parts of PR #1434's published best stack carry its gain?"
base tidal_1434
leave_one_out

control_every 10
seeds 1337 42 7
decide "a part whose removal is inside noise is not load-bearing at this scale"
run_wave "$@"
