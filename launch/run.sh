#!/usr/bin/env bash
# Runs a tool's ranks on the machines of a hostfile, as launch/train.sh does a training's.
#
#   launch/run.sh --hostfile launch/hosts tools/precompute_latents.py --images DIR --vae VAE --out DIR
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m dit_ds.supervisor "$@"
