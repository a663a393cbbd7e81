"""Measure against limits and peers in one run; see tools/BENCHMARKS.md.

python tools/benchmark.py loader       # reading latents: preadv, ours, webdataset, a file each
python tools/benchmark.py precompute   # encoding images: ours against the bare VAE
python tools/benchmark.py order        # finding a step's samples among a billion
python tools/benchmark.py checkpoint   # saving: how long training waits, and the disk's bandwidth
"""

from __future__ import annotations

import argparse
import json

from dit_ds import benchmark


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("loader", "precompute", "order", "checkpoint"))
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="medians are of N")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args(arguments)
    found = getattr(benchmark, args.what)(repeats=args.repeats)
    for name, value in found.items():
        print(f"{name:28} {value:,.6g}" if isinstance(value, float) else f"{name:28} {value:,}")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
