# shellcheck shell=bash
# The words of a wave. A wave is a short script that reads like data:
#
#     #!/usr/bin/env bash
#     source sweeps/lib.sh              # from anywhere: source /path/to/this/project/sweeps/lib.sh
#     question "Does the stack of PR #1434 hold when each part is taken out?"
#     base tidal_1434 ITERATIONS=300
#     arm relu2 "silu2 was worth 0.008 there" MLP_ACT=relu2
#     leave_one_out
#     control_every 10
#     seeds 1337 42 7
#     decide "an arm that is worse than the control beyond noise carries weight"
#     run_wave "$@"
#
# README.md beside this file has a worked example. This file only collects the words; sweeps/lab/wave_spec.py
# checks them and wave_engine.py runs them (see its --help for what may follow the wave's name on the command
# line). Works with bash 3.2.
set -euo pipefail

words=()
known_words=(question base arm control_every seeds decide leave_one_out add_one_in horizons run_wave)

say_word() { words+=("$@"); }
want() {  # COUNT USAGE WORD...: ends the script unless at least COUNT words are there
  (($# - 2 >= $1)) || { printf '%s: usage: %s\n' "${0##*/}" "$2" >&2; exit 2; }
}

question() { want 1 'question "TEXT"' "$@"; say_word @question "$*"; }
base() { want 1 'base PRESET [KNOB=VALUE ...]' "$@"; say_word @base "$@"; }
arm() { want 3 'arm NAME "HYPOTHESIS" KNOB=VALUE ...' "$@"; say_word @arm "$@"; }
seeds() { want 1 'seeds SEED ...' "$@"; say_word @seeds "$@"; }
decide() { want 1 'decide "TEXT"' "$@"; say_word @decide "$*"; }

# The control runs again after so many arms, which shows the noise of one seed. Where a run gives the same bits
# again, on a CPU without a clock, such reruns are left out.
control_every() { want 1 'control_every ARMS' "$@"; say_word @control_every "$@"; }

# Arms made by rule: each knob of the base preset back at the baseline's value, or only the KNOBs named;
# each knob of PRESET alone on the base. Without PRESET the wave turns round: the base becomes `baseline`,
# and the preset that was the base gives the knobs.
leave_one_out() { say_word @leave_one_out "$@"; }
add_one_in() { say_word @add_one_in "$@"; }

# The same arms at each of these ITERATIONS; every length is a wave of its own, named WAVE_hLENGTH.
horizons() { want 2 'horizons STEPS STEPS ...' "$@"; say_word @horizons "$@"; }

# Bash 4 and newer call this for a command that they do not find; the script ends with its exit code.
command_not_found_handle() {
  local near=''
  if command -v python3 >/dev/null; then
    near=$(python3 -c 'import difflib, sys
print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], n=1))' "$1" "${known_words[@]}") || near=''
  fi
  if [[ -n $near ]]; then
    printf '%s: %s is no word of a wave; did you mean %s?\n' "${0##*/}" "$1" "$near" >&2
  else
    printf '%s: %s is no word of a wave; the words: %s\n' "${0##*/}" "$1" "${known_words[*]}" >&2
  fi
  return 2
}

run_wave() {
  local name=${0##*/} called_from=$PWD root
  unset -f command_not_found_handle
  name=${name%.sh}
  root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
  cd -- "$root"
  source sweeps/python_env.sh
  use_python requirements.txt
  [[ $PYTHON == .venv/* ]] && PYTHON=$root/$PYTHON
  cd -- "$called_from"  # so that a path on the command line means what it meant there
  exec "$PYTHON" "$root/sweeps/run_wave.py" "$name" ${words[@]+"${words[@]}"} -- "$@"
}
