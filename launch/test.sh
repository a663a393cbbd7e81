#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
#   bash launch/test.sh                            checks of style and types, and the tests that take seconds
#   bash launch/test.sh --slow                     also those that take minutes
#   bash launch/test.sh --multinode                those on several hosts, made out of namespaces (needs root)
#   bash launch/test.sh tests/test_digits.py -x    some of them
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment test,dev

# GPUs, where there are any, are for the tests that ask for one.
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
selection=()
if [[ " $* " == *" --slow "* ]]; then
  selection=(-m "not gpu and not multinode")
fi
if [[ " $* " == *" --multinode "* ]]; then
  selection=(-m multinode)
  PATH=$PATH:/usr/sbin:/sbin
  have() { for program; do command -v "$program" > /dev/null || return; done; }
  if ! have sshd ssh pdsh ip && have apt-get && ((EUID == 0)); then
    say "Installing ssh, pdsh and iproute2"
    packages=(openssh-server openssh-client pdsh iproute2 procps)
    # Where that fails the tests say what is missing, and skip.
    { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends "${packages[@]}"; } || true
  fi
fi
arguments=()
for argument in "$@"; do
  [[ $argument == --slow || $argument == --multinode ]] || arguments+=("$argument")
done

say "Checking style and types"
style=0
for check in "ruff check" "ruff format --check" mypy; do $check || style=1; done

say "Running the tests"
trap - ERR # pytest's closing line says it all
status=0
python -m pytest "${selection[@]}" "${arguments[@]}" || status=$?
((status != 0 || style == 0)) || die "the tests passed, but ruff or mypy has complaints, above."
exit "$status"
