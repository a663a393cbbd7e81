"""Measure against limits and peers in one run; see tools/BENCHMARKS.md.

python tools/benchmark.py loader       # reading latents: preadv, ours, webdataset, a file each
python tools/benchmark.py precompute   # encoding images: ours against the bare VAE
python tools/benchmark.py order        # finding a step's samples among a billion
python tools/benchmark.py checkpoint   # saving: how long training waits, and the disk's bandwidth
launch/run.sh --num_gpus 2 tools/benchmark.py network   # links, and what each ZeRO stage sends
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from dit_ds import benchmark, benchmark_network, distributed

WHAT: dict[str, Callable[..., dict[str, float]]] = {
    "loader": benchmark.loader,
    "precompute": benchmark.precompute,
    "order": benchmark.order,
    "checkpoint": benchmark.checkpoint,
    "network": benchmark_network.measure,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="medians are of N")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    args = parser.parse_args(arguments)
    try:
        found = WHAT[args.what](repeats=args.repeats)
    except ValueError as e:
        distributed.exit_with(e)
    if distributed.is_main():
        width = max(28, *map(len, found))
        for name, value in found.items():
            told = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
            print(f"{name:{width}} {told}")
        if args.json:
            print(json.dumps(found))
    distributed.shutdown()


if __name__ == "__main__":
    main()
