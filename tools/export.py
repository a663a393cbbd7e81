"""Weights from a run or a file into another file or folder; names tell the layouts.

    python tools/export.py --run RUN_DIR --out FILE.safetensors [--ema-length 0.10]
    python tools/export.py --weights FILE_OR_FOLDER --out FILE_OR_FOLDER

FILE.safetensors is ours, FILE.pt the published DiT's layout, a folder a diffusers `DiTPipeline`.
A run gives the average (EMA) of its newest checkpoint, whatever ZeRO stage and ranks wrote it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from dit_ds import distributed, exchange, export
from dit_ds.layouts import Unsaid

STEPS_OF_STOCK = "for a folder of diffusers' own classes, right at this number of steps alone"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="its newest checkpoint")
    source.add_argument("--weights", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE_OR_FOLDER")
    parser.add_argument(
        "--ema-length",
        type=float,
        metavar="SIGMA_REL",
        help="of a run with post_hoc_ema.every: this average in place of the plain one",
    )
    parser.add_argument(
        "--vae", metavar="PATH_OR_ID", help="of a folder, or of weights that do not name theirs"
    )
    told = parser.add_argument_group("what files of tensors alone do not tell")
    told.add_argument("--image-size", type=int, metavar="PIXELS", help="default: 8 x the latents")
    told.add_argument("--num-heads", type=int, metavar="N", help="default: as in the zoo")
    told.add_argument("--scaling-factor", type=float, metavar="X", help="of latents: 0.18215")
    told.add_argument("--class-names", type=Path, metavar="FILE", help="a name on each line")
    parser.add_argument("--stock-steps", type=int, metavar="N", help=STEPS_OF_STOCK)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args(arguments)
    try:
        if args.run:
            weights = export.from_run(args.run, ema_length=args.ema_length)
        else:
            if args.ema_length is not None:
                raise ValueError("--ema-length needs --run, whose snapshots it is made of")
            weights = exchange.read(args.weights, unsaid(args))
        check_taken(args, weights.about)
        with distributed.agreed():
            exchange.write(weights, args.out, vae=args.vae, num_steps=args.stock_steps)
    except ValueError as error:
        distributed.exit_with(error)
    about = weights.about
    num_parameters = sum(t.numel() for t in weights.state.values())
    what = f"EMA at step {about.step} ({about.images_seen} images)"
    beside = exchange.description_of(args.out)
    print(
        f"{args.out}: {what if about.dataset else args.weights}, {num_parameters / 1e6:.1f} M "
        f"values{f', description in {beside}' if beside else ''}"
    )
    if args.json:
        facts = {"out": str(args.out), "step": about.step, "images": about.images_seen}
        print(json.dumps(facts | {"values": num_parameters}), flush=True)


def check_taken(args: argparse.Namespace, about: export.Description) -> None:
    """Refuse what was said of the source and is not so; a folder takes any decoder that fits."""
    said = unsaid(args)
    if exchange.description_of(args.out) is None:
        said = dataclasses.replace(said, vae=None)
    said.check_taken(about, args.run or args.weights)


def unsaid(args: argparse.Namespace) -> Unsaid:
    """What the command line tells of tensors."""
    names = None
    if args.class_names is not None:
        try:
            names = args.class_names.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"--class-names {args.class_names}: cannot be read ({e})") from e
    for option in ("image_size", "num_heads"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if (scale := args.scaling_factor) is not None and not 0 < scale < math.inf:
        raise ValueError(f"--scaling-factor {scale} must be above 0")
    return Unsaid(
        vae=args.vae,
        scaling_factor=args.scaling_factor,
        image_size=args.image_size,
        num_heads=args.num_heads,
        class_names=names,
    )


if __name__ == "__main__":
    main()
