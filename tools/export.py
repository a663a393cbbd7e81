"""Write a run's averaged (EMA) weights as one safetensors file, its description beside it.

    python tools/export.py --run RUN_DIR --out FILE.safetensors [--ema-length 0.10]

Works on the newest checkpoint, whatever ZeRO stage and number of ranks wrote it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_ds import distributed, export


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument(
        "--ema-length",
        type=float,
        metavar="SIGMA_REL",
        help="of a run with post_hoc_ema.every: this average in place of the plain one",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args(arguments)
    try:
        weights = export.from_run(args.run, ema_length=args.ema_length)
        with distributed.agreed():
            export.save(weights, args.out)
    except ValueError as error:
        distributed.exit_with(error)
    about = weights.about
    num_parameters = sum(t.numel() for t in weights.state.values())
    print(
        f"{args.out}: EMA at step {about.step} ({about.images_seen} images), "
        f"{num_parameters / 1e6:.1f} M values, description in {args.out.with_suffix('.json')}"
    )
    if args.json:
        facts = {"out": str(args.out), "step": about.step, "images": about.images_seen}
        print(json.dumps(facts | {"values": num_parameters}), flush=True)


if __name__ == "__main__":
    main()
