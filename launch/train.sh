#!/usr/bin/env bash
# Starts a training run on this machine, or on the machines of a hostfile. It is `deepspeed --module
# dit_ds.train` with the check that DeepSpeed lacks: given a hostfile that is missing, or that names
# one other machine, DeepSpeed trains on this machine alone and says little about it.
#
#   launch/train.sh [DeepSpeed's options] --config RECIPE [options of dit_ds.train] [section.key=value]
#   launch/train.sh --hostfile launch/hosts --config quickstart --deepspeed_config ds_configs/zero2.json
#
# What stands before --config is for DeepSpeed, the rest for dit_ds.train.
set -euo pipefail

die() { printf 'train.sh: %s\n' "$1" >&2 && exit 2; }

check_hostfile() {
  local line='a line `HOST slots=NUMBER_OF_GPUS` for each machine' hosts
  [[ -f $1 && -r $1 ]] || die "--hostfile $1 does not exist; write it with $line (launch/hosts is an example)."
  hosts=$(awk '!/^[ \t]*(#|$)/ { print $1 }' "$1")
  [[ -n $hosts ]] || die "--hostfile $1 names no machine; write $line, or leave the option out to train on this one."
  [[ $hosts != *$'\n'* && " $* " != *" --force_multi "* ]] || return 0
  here=(--no_ssh_check --master_addr 127.0.0.1) # or DeepSpeed asks this machine by ssh for its name
  if ! is_here "$hosts"; then
    die "--hostfile $1 names one machine, $hosts, which is not this one, and DeepSpeed would train here; add --force_multi before --config, or start it on $hosts."
  fi
}

# What comes to other hosts is read once more by a shell there, which must find nothing to change.
encode() {
  if [[ $1 =~ ^[A-Za-z0-9_./=:,+@%-]+$ && $1 != base64:* ]]; then
    printf %s "$1"
  else
    printf base64: && printf %s "$1" | base64 --wrap 0
  fi
}

is_here() { [[ " localhost 127.0.0.1 ::1 $(hostname) $(hostname -s) $(hostname -I) " == *" $1 "* ]]; }

launcher=() here=() words=() far=
while (($#)) && [[ $1 != --config && $1 != --config=* ]]; do launcher+=("$1") && shift; done
(($#)) || die "--config is missing; name a recipe, e.g. --config quickstart."

for ((i = 0; i < ${#launcher[@]}; i++)); do
  case ${launcher[i]} in
    --ho*=*) far=1 && check_hostfile "${launcher[i]#*=}" "${launcher[@]}" ;;
    -H | --ho*) far=1 && check_hostfile "${launcher[i + 1]:-}" "${launcher[@]}" ;; # argparse takes --host too
    -H*) far=1 && check_hostfile "${launcher[i]#-H}" "${launcher[@]}" ;;
  esac
done
for word in "$@"; do words+=("$([[ $far ]] && encode "$word" || printf %s "$word")"); done

environment=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
if ! command -v deepspeed > /dev/null; then
  [[ -x $environment/deepspeed ]] || die "There is no \`deepspeed\` on PATH; activate the environment, or make one with \`bash launch/quickstart.sh\`."
  PATH=$environment:$PATH
fi
exec deepspeed "${here[@]}" "${launcher[@]}" --module dit_ds.train "${words[@]}"
