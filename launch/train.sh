#!/usr/bin/env bash
# Trains on this machine, on those of a hostfile, or on those of a Slurm job, and sees that the run
# starts, ends and comes back as one: `python -m dit_ds.supervisor --help` has the options.
#
#   launch/train.sh --hostfile launch/hosts --max-restarts 10 --config RECIPE [section.key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m dit_ds.supervisor --module dit_ds.train "$@"
