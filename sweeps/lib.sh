# shellcheck shell=bash
# The words of a wave. A wave is a short script that reads like data:
#
#     #!/usr/bin/env bash
#     source "$(dirname "$0")/lib.sh"
#     question "Does the stack of PR #1434 hold when each part is taken out?"
#     base tidal_1434 ITERATIONS=300
#     arm relu2 "silu2 was worth 0.008 there" MLP_ACT=relu2
#     leave_one_out
#     control_every 10
#     seeds 1337 42 7
#     decide "an arm that is worse than the control beyond noise carries weight"
#     run_wave "$@"
#
# This file only collects the words; sweeps/lab/wave_spec.py checks them and wave_engine.py runs them (see its
# --help for what may follow the wave's name on the command line). Works with bash 3.2.
set -euo pipefail

words=()

say_word() { words+=("$@"); }
want() {  # COUNT USAGE WORD...: ends the script unless at least COUNT words are there
  (($# - 2 >= $1)) || { printf '%s: usage: %s\n' "${0##*/}" "$2" >&2; exit 2; }
}

question() { want 1 'question "TEXT"' "$@"; say_word @question "$*"; }
base() { want 1 'base PRESET [KNOB=VALUE ...]' "$@"; say_word @base "$@"; }
arm() { want 3 'arm NAME "HYPOTHESIS" KNOB=VALUE ...' "$@"; say_word @arm "$@"; }
control_every() { want 1 'control_every ARMS' "$@"; say_word @control_every "$@"; }
seeds() { want 1 'seeds SEED ...' "$@"; say_word @seeds "$@"; }
decide() { want 1 'decide "TEXT"' "$@"; say_word @decide "$*"; }

# Arms made by rule: each knob of the base preset back at the baseline's value, or only the KNOBs named;
# each knob of PRESET alone on the base. Without PRESET the wave turns round: the base becomes `baseline`,
# and the preset that was the base gives the knobs.
leave_one_out() { say_word @leave_one_out "$@"; }
add_one_in() { say_word @add_one_in "$@"; }

# The same arms at each of these ITERATIONS; every length is a wave of its own, named WAVE_hLENGTH.
horizons() { want 2 'horizons STEPS STEPS ...' "$@"; say_word @horizons "$@"; }

run_wave() {
  local name=${0##*/}
  name=${name%.sh}
  CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
  source sweeps/python_env.sh
  use_python requirements.txt
  exec "$PYTHON" -m sweeps.lab.wave_engine "$name" ${words[@]+"${words[@]}"} -- "$@"
}
