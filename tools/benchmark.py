"""Measure against limits and peers in one run; see tools/BENCHMARKS.md.

python tools/benchmark.py loader       # reading latents: preadv, ours, webdataset, a file each
python tools/benchmark.py precompute   # encoding images: ours against the bare VAE
python tools/benchmark.py order        # finding a step's samples among a billion
python tools/benchmark.py checkpoint   # saving: how long training waits, and the disk's bandwidth
launch/run.sh --num_gpus 2 tools/benchmark.py network   # links, and what each ZeRO stage sends

python tools/benchmark.py digits --repeats 3       # the modern recipe against the published one
python tools/benchmark.py optimizers --repeats 3   # Sophia-G against AdamW, both tuned
python tools/benchmark.py sophia                   # what Sophia-G costs: time and state
python tools/benchmark.py samplers --repeats 3     # quality by sampler and model calls, with a plot
These four train on the digits, in --work, which is kept: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

from dit_ds import benchmark, benchmark_digits, benchmark_network, benchmark_samplers, distributed

WHAT: dict[str, Callable[..., dict[str, float]]] = {
    "loader": benchmark.loader,
    "precompute": benchmark.precompute,
    "order": benchmark.order,
    "checkpoint": benchmark.checkpoint,
    "network": benchmark_network.measure,
}
DIGITS: dict[str, Callable[..., dict[str, float]]] = {
    "digits": benchmark_digits.digits_learned,
    "optimizers": benchmark_digits.optimizers,
    "sophia": benchmark_digits.sophia_cost,
    "samplers": benchmark_samplers.samplers,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=[*WHAT, *DIGITS])
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="medians are of N; of digits, seeds"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="of the four on digits; default: runs/benchmark"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    args = parser.parse_args(arguments)
    try:
        if args.what in WHAT:
            if args.work is not None:
                raise ValueError(f"--work {args.work} has no meaning for {args.what}; leave it out")
            measure = WHAT[args.what]
        else:
            work = (args.work or Path("runs/benchmark")).resolve()
            measure = functools.partial(DIGITS[args.what], work)
        found = measure(repeats=args.repeats)
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
