# shellcheck shell=bash
# Finds or makes the Python that runs this project. Source it from the project's folder, then call
#     use_python requirements.txt [requirements-lab.txt]
# which leaves its command in PYTHON. Works with bash 3.2, the one macOS has.

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
die() { say "$*" >&2; exit 1; }

# The packages named in requirements files, by import name, as one comma-separated line. pytest-xdist is xdist.
package_names() {
  sed -E 's/[[:space:]]*#.*//; s/[^A-Za-z0-9_-].*//; /^$/d; s/^pytest-xdist$/xdist/; y/-/_/' "$@" | sort -u | paste -s -d , -
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

has_packages() {  # COMMAND FILE...
  local python=$1
  shift
  "$python" -c "import $(package_names "$@")" >/dev/null 2>&1
}

file_hash() { .venv/bin/python -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1" 2>/dev/null; }

# A stamp per requirements file, written last, says that all of it is in .venv.
stamp() { printf '.venv/%s.sha256' "$1"; }

venv_is_complete() {  # FILE...
  local file
  for file in "$@"; do
    [[ -f $(stamp "$file") && $(file_hash "$file") == "$(cat "$(stamp "$file")")" ]] || return 1
  done
}

# The word for pip that adds the right build of torch, or none where the default one, of CUDA 13, is right.
# Without a GPU the default would bring gigabytes of CUDA libraries for nothing; drivers before 580 and
# GPUs before compute capability 7.5 need a build of CUDA 12.
torch_wheels() {
  local build index
  [[ $(uname -s) == Linux ]] && ! command -v rocm-smi >/dev/null || return 0
  build=$(torch_build)
  index=https://download.pytorch.org/whl/$build
  [[ -n $build ]] || return 0
  .venv/bin/python -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" >/dev/null 2>&1 || return 0
  echo "--extra-index-url=$index"
}

torch_build() {  # cpu, cu126, cu128, or nothing for the default
  local gpu driver capability
  command -v nvidia-smi >/dev/null || { echo cpu; return; }
  gpu=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  driver=${gpu%%.*} capability=${gpu##*, }
  [[ $driver =~ ^[0-9]+$ ]] || return 0
  if [[ $capability =~ ^[5-7]\.[0-4]$ ]]; then echo cu126
  elif ((driver >= 580)); then return
  elif ((driver >= 570)); then echo cu128
  else echo cu126
  fi
}

make_venv() {  # COMMAND FILE...
  local python=$1 file
  shift
  "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
    die "$python cannot make virtual environments; on Debian or Ubuntu: sudo apt install python3-venv"
  say "installs $* into .venv, once (about 1 minute, with CUDA libraries about 5)"
  local requirements=()
  for file in "$@"; do
    rm -f "$(stamp "$file")"
    requirements+=(-r "$file")
  done
  say "makes .venv (usually 5 s), then downloads and installs with pip"
  "$python" -m venv .venv || die "could not make .venv"
  local quiet=--quiet
  [[ ! -t 1 ]] || quiet=''  # on a terminal pip shows what it fetches, and how far it is
  # shellcheck disable=SC2046,SC2086  # no word at all where the default index is right
  .venv/bin/python -m pip install $quiet --disable-pip-version-check $(torch_wheels) \
    -c constraints.txt "${requirements[@]}" ||
    die "pip could not install $* (above); run again to go on from here"
  has_packages .venv/bin/python "$@" || die ".venv is damaged: remove it and run again"
  for file in "$@"; do file_hash "$file" > "$(stamp "$file")"; done
}

# shellcheck disable=SC2034  # PYTHON is for the caller
use_python() {  # FILE...: the active Python if it has the packages, else .venv
  local candidate base=''
  say "looks for a Python with the packages of $* (usually 3 s, after a restart longer)"
  for candidate in python3 python; do
    is_recent "$candidate" || continue
    if has_packages "$candidate" "$@"; then PYTHON=$candidate; return; fi
    base=${base:-$candidate}
  done
  PYTHON=.venv/bin/python
  venv_is_complete "$@" && return
  [[ -n $base ]] || die "needs Python 3.10 or newer as python3 or python on PATH"
  # Of several first runs at once, one installs and the others wait; where there is no flock they take their chance.
  if command -v flock >/dev/null; then
    exec 9<sweeps/python_env.sh
    flock -n 9 || { say "waits for another run that makes .venv"; flock 9 || true; }
  fi
  venv_is_complete "$@" || make_venv "$base" "$@"
  exec 9<&-
}
