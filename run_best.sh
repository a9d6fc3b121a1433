#!/usr/bin/env bash
# Sets up Python and data, trains and scores on this machine. `bash run_best.sh --help` says how.
# With Windows line ends bash cannot read this file; the next line is one that it can read even so.
[[ $(head -n 1 "$0") != *$'\r' ]] || { echo "error: $0 has Windows line ends (CRLF), which bash cannot read. In a clone without changes of your own: git rm -rq --cached . && git reset -q --hard; else: sed -i 's/\\r\$//' on its files" >&2; exit 2; }  #
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")"
source sweeps/python_env.sh

overlay=sweeps/presets/cpu.env
byte_order_mark=$'\xef\xbb\xbf'  # some editors begin a file with it

is_overlay() { [[ $1 == "$overlay" || $1 == sweeps/presets/proxy.env ]]; }  # of sizes: no presets

presets() {
  local file
  for file in sweeps/presets/*.env; do
    is_overlay "$file" || basename "$file" .env
  done
}

usage() {
  local name
  echo "usage: bash run_best.sh [PRESET] [--dry-run] [KNOB=VALUE ...]"
  echo
  echo "Presets (default best), from sweeps/presets:"
  for name in $(presets); do
    printf '  %-20s %s\n' "$name" "$(sed -n '1s/^# *//p' "sweeps/presets/$name.env")"
  done
  echo
  echo "KNOB=VALUE wins over the environment, that over $overlay (laid on where torch"
  echo "sees no CUDA GPU or DEVICE=cpu), that over the preset. --dry-run, --check: do not train."
  echo "PACKED=1 packs the script into OUT_DIR and runs it as it would ship (records/README.md)."
  echo "Relative paths count from the script's folder. All knobs: python train_gpt.py --help"
}

misuse() {
  say "$* (presets: $(presets | paste -s -d ' ' -); see --help)" >&2
  exit 2
}

is_assignment() { [[ $1 =~ ^[A-Z][A-Z0-9_]*= ]]; }

# Exports what a file assigns, except names that are set by now. Read backwards, so its later lines win.
# What it exported is left in `applied`; its names join SET_BY_PRESET, which training leaves out of the command
# that goes on.
apply() {
  local words=() line i name
  applied=''
  while IFS=$' \t\r' read -ra line || ((${#line[@]})); do
    line[0]=${line[0]-}
    line[0]=${line[0]#"$byte_order_mark"}
    [[ ${line[0]:-#} == '#'* ]] || words+=("${line[@]}")
  done <"$1"
  for ((i = ${#words[@]} - 1; i >= 0; i--)); do
    is_assignment "${words[i]}" || die "$1: not KNOB=VALUE: $(printf %q "${words[i]}")"
    name=${words[i]%%=*}
    [[ -z ${!name+set} ]] || continue
    export "${words[i]}"
    SET_BY_PRESET="$SET_BY_PRESET $name"
    applied="${words[i]}${applied:+ $applied}"
  done
}

choose_data() {
  local pieces=${VOCAB_SIZE:-1024}  # of the tokenizer: some presets want more than the baseline's
  local fineweb=data/datasets/fineweb10B_sp$pieces tokenizer=data/tokenizers/fineweb_${pieces}_bpe.model
  if [[ -n ${DATA_PATH+set}${TOKENIZER_PATH+set} ]]; then
    say "data: as given, DATA_PATH=${DATA_PATH-(default)} TOKENIZER_PATH=${TOKENIZER_PATH-(default)}"
  elif compgen -G "$fineweb/fineweb_train_*.bin" >/dev/null &&
    compgen -G "$fineweb/fineweb_val_*.bin" >/dev/null && [[ -f $tokenizer ]]; then
    export DATA_PATH=$fineweb TOKENIZER_PATH=$tokenizer
    say "data: FineWeb, $DATA_PATH"
  elif [[ $pieces != 1024 && -n $dry_run ]]; then
    say "data: none of $pieces pieces is here"
  elif [[ $pieces != 1024 ]]; then
    say "no data of VOCAB_SIZE=$pieces pieces here; fetch $fineweb with \`$PYTHON data/fineweb.py --variant sp$pieces\`, or set DATA_PATH and TOKENIZER_PATH" >&2
    exit 2
  else
    export DATA_PATH=data/datasets/pydocs_sp1024 TOKENIZER_PATH=data/tokenizers/pydocs_1024_bpe.model
    say "data: no FineWeb shards here, so the embedded corpus, $DATA_PATH"
    "$PYTHON" data/pydocs.py
  fi
}

# The seconds in the last event of the run of a folder; 0 without a log.
last_event() {
  local seconds
  seconds=$(tail -q -n 2 "$1"/logs/*.jsonl 2>/dev/null | sed -n 's/.*"time": \([0-9]*\).*/\1/p' | sort -n | tail -n 1)
  echo "${seconds:-0}"
}

# The preset's newest run under runs/ that left checkpoints, if there is one. A copy to another disk loses the
# times of files, so the logs say which is the newest.
unfinished_run() {
  local folder newest='' seconds newest_seconds=0
  for folder in "runs/$preset"-*/checkpoints; do
    [[ -d $folder ]] || continue
    # What a file browser leaves keeps the folder of a finished run.
    compgen -G "$folder/*.pt" >/dev/null || [[ -z $(ls -A "$folder") ]] || continue
    seconds=$(last_event "${folder%/checkpoints}")
    if ((seconds >= newest_seconds)); then
      newest=$folder
      newest_seconds=$seconds
    fi
  done
  [[ -z $newest ]] || basename "${newest%/checkpoints}"
}

# Runs a command and leaves its exit code in `status`. Signals go on to it as SIGTERM, which torchrun too hands to
# its ranks, so that it can save its state; a terminal's Ctrl-C reaches it by itself. On Linux it gets SIGTERM
# also when this script is killed.
supervise() {
  local child='' again='' stopped='' tie=()
  ! setpriv --pdeathsig TERM true 2>/dev/null || tie=(setpriv --pdeathsig TERM)
  pass_on() {
    again=1 stopped=1
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
  }
  trap pass_on TERM HUP USR1 USR2 XCPU
  trap 'if [[ -t 0 || -t 2 ]]; then again=1; else pass_on; fi' INT
  (trap - INT; exec ${tie[@]+"${tie[@]}"} "$@") &  # a background command would otherwise ignore Ctrl-C
  child=$!
  [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null || true  # it came before the number was known
  while :; do
    status=0
    wait "$child" || status=$?
    [[ -n $again ]] || break
    again=''
  done
  trap - TERM HUP USR1 USR2 XCPU INT
}

# Packs train_gpt.py into a folder and leaves its path in `script`. A run that goes on keeps the packed script
# that it began with: its checkpoints belong to that.
pack_into() {
  script=$1/train_gpt.py
  if [[ ${RESUME:-0} != 0 && -f $script ]]; then
    say "goes on with the packed script in $1"
  else
    say "packs the script (usually 3 s)"
    "$PYTHON" records/pack_script.py -o "$script"
  fi
}

preset='' dry_run='' SET_BY_PRESET=''
for argument in "$@"; do
  case $argument in
    -h | --help) usage; exit 0 ;;
    --check | --dry-run) dry_run=1 ;;
    *)
      if is_assignment "$argument"; then
        export "${argument?}"
      elif [[ ! $argument =~ ^[a-z0-9_]+$ ]]; then
        misuse "neither a preset nor KNOB=VALUE: $argument"
      elif [[ -n $preset ]]; then
        misuse "two presets: $preset and $argument"
      elif [[ ! -f sweeps/presets/$argument.env ]] || is_overlay "sweeps/presets/$argument.env"; then
        misuse "unknown preset: $argument"
      else
        preset=$argument
      fi
      ;;
  esac
done
preset=${preset:-best}
packed=${PACKED:-0} script=train_gpt.py
[[ $packed == [01] ]] || misuse "PACKED=$packed is neither 0 nor 1"
unset PACKED  # it is no knob
STARTED_BY="bash $(printf %q "$PWD/run_best.sh") $preset"  # the command that goes on begins so
((packed == 0)) || STARTED_BY+=' PACKED=1'

use_python requirements.txt
say "asks torch for GPUs (usually 3 s)"
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available() * torch.cuda.device_count())')
[[ ${DEVICE:-auto} != cpu ]] || gpus=0
if ((gpus == 0)); then
  sizing='' own=${overlay%.env}/$preset.env  # a preset may need sizes of its own; they go first
  if [[ -f $own ]]; then apply "$own"; sizing="$applied "; fi
  apply "$overlay"
  sizing=$sizing$applied
  say "no CUDA GPU to use: CPU sizing from $overlay: ${sizing:-(nothing, all set already)}"
fi
apply "sweeps/presets/$preset.env"
say "preset $preset: ${applied:-(nothing to set)}"
choose_data
if [[ ${RESUME:-} == auto && -z ${RUN_ID-}${OUT_DIR-} ]]; then RUN_ID=$(unfinished_run); fi
# The time and a random part: a loop may start several runs in one second.
export RUN_ID=${RUN_ID:-$preset-$(date -u +%Y%m%d-%H%M%S)-$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')}
export OUT_DIR=${OUT_DIR:-runs/$RUN_ID}
export STARTED_BY SET_BY_PRESET

if [[ -n $dry_run ]]; then
  if ((packed)); then
    mkdir -p runs
    folder=$(mktemp -d runs/.packed-XXXXXX)
    trap 'rm -rf "$folder"' EXIT
    pack_into "$folder"
  fi
  "$PYTHON" "$script" --dry-run
  exit
fi
if ((packed)); then pack_into "$OUT_DIR"; fi
run=("$PYTHON")
((gpus < 2)) || run+=(-m torch.distributed.run --standalone "--nproc_per_node=$gpus")
say "run $RUN_ID on $gpus GPU, files in $OUT_DIR; the first lines come after about 10 s"
log=$OUT_DIR/logs/$RUN_ID.jsonl
log_bytes() { if [[ -f $log ]]; then wc -c <"$log"; else echo 0; fi; }
bytes_before=$(log_bytes)
supervise "${run[@]}" "$script"

# A run that was refused has left no line: what stands there is an earlier run's.
if [[ $(log_bytes) != "$bytes_before" ]]; then
  # torchrun turns every failure into 1; the run's own code stands in its log.
  ((status == 0 || gpus < 2)) || status=$("$PYTHON" sweeps/summary.py --exit-code "$log" || echo "$status")
  "$PYTHON" sweeps/summary.py "$log" || true
fi
exit "$status"
