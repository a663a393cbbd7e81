# Shared by the scripts beside it, to be sourced: the repository as working folder, one-sentence
# errors, and a Python environment with the pinned packages. Later scripts call
#   use_environment EXTRAS      e.g. use_environment quickstart,test

set -Eeuo pipefail
export DS_BUILD_OPS=0 # DeepSpeed then compiles nothing: no compiler is needed
export PYTHONUNBUFFERED=1
NEEDED_GB=4 # what the packages take with torch's CPU build, and what pip wants beside it

cd "$(dirname "${BASH_SOURCE[0]}")/.."
REPO=$PWD
DOING="starting"

say() { DOING=$1 && printf '\n== %s\n' "$1"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$1" >&2 && trap - ERR && exit "${2:-1}"; }
trap 'die "failed while ${DOING,}; the lines above say why. Run the same command again to go on." $?' ERR
trap 'die "interrupted while ${DOING,}; run the same command again to go on." 130' INT

# Succeeds if $1 runs and is a Python that the packages exist for. (A pyenv shim may not run.)
good_python() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null
}

free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }'; }

# Puts the active environment, or the repository's own .venv, first on PATH.
find_environment() {
  local active=${VIRTUAL_ENV:-} candidate python=
  if [[ -z $active && -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
    active=$CONDA_PREFIX # conda's base is for conda itself
  fi
  if [[ -n $active ]]; then
    good_python "$active/bin/python" || die "The active environment $active has no Python 3.10, 3.11 or 3.12; \`deactivate\` it or activate another."
    ENVIRONMENT=$active
  elif good_python .venv/bin/python && .venv/bin/python -m pip --version > /dev/null 2>&1; then
    ENVIRONMENT=$REPO/.venv
  else
    for candidate in ${PYTHON:-python3 python python3.12 python3.11 python3.10}; do
      if good_python "$candidate"; then python=$candidate && break; fi
    done
    [[ -n $python ]] || die "No Python 3.10, 3.11 or 3.12 found; install one or name it: PYTHON=/path/to/python3.11 bash $0"
    say "Making the environment $REPO/.venv with $("$python" --version)"
    "$python" -m venv --clear .venv || die "$python cannot make an environment; on Debian and Ubuntu: apt-get install python3-venv"
    ENVIRONMENT=$REPO/.venv
  fi
  export VIRTUAL_ENV=$ENVIRONMENT PATH=$ENVIRONMENT/bin:$PATH
  unset PYTHONHOME
}

# Installs dit_ds[$1] with the exact versions of constraints.txt, unless that has been done.
install_packages() {
  local extras=$1 stamp=$ENVIRONMENT/.dit_ds-$1 wanted free
  wanted=$(cat <(echo "$REPO $extras") setup.py constraints.txt <(python --version) | sha256sum)
  if [[ $(cat "$stamp" 2> /dev/null) == "$wanted" ]]; then
    say "Packages are installed in $ENVIRONMENT"
    return
  fi
  free=$(free_gb "$ENVIRONMENT")
  if ! python -c 'import importlib.util as u; assert u.find_spec("torch")' 2> /dev/null; then
    ((free >= NEEDED_GB)) || die "$ENVIRONMENT has $free GB of free disk, and the packages need $NEEDED_GB GB (torch's CUDA build 10 GB)."
    if ! command -v nvidia-smi > /dev/null && [[ -z ${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-} ]]; then
      echo "No GPU here? With PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu pip spares gigabytes of CUDA."
    fi
  fi
  say "Installing dit_ds[$extras] into $ENVIRONMENT (minutes the first time)"
  if ! python -m pip install -c constraints.txt -e ".[$extras]"; then
    free=$(free_gb "$ENVIRONMENT")
    ((free >= 1)) || die "The disk of $ENVIRONMENT is full; free some space and run the same command again."
    die "pip could not install the packages; its message is above."
  fi
  echo "$wanted" > "$stamp"
}

use_environment() { find_environment && install_packages "$1"; }
