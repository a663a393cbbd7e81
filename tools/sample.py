"""Draw images from a run or from exported weights.

    python tools/sample.py --run RUN_DIR --vae PATH_OR_ID --classes 0-9 --per-class 8 --out grid.png
    python tools/sample.py --weights FILE.safetensors --vae PATH_OR_ID --classes 207,360
    deepspeed tools/sample.py ... --num-images 50000 --npz images.npz   # over all GPUs

Always the averaged (EMA) weights. Image i of a seed is the same on any number of ranks. See
`dit_ds.samplers` and, for what is written, `dit_ds.sampling`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import get_args

import torch

from dit_ds import distributed, export, latents, sampling
from dit_ds.samplers import SamplerSettings, check, default_sampler
from dit_ds.sampling import GRID_SIDE
from dit_ds.settings import Sampler


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="its newest checkpoint")
    source.add_argument("--weights", type=Path, metavar="FILE.safetensors", help="an export")
    parser.add_argument("--vae", metavar="PATH_OR_ID", help="default: the one of the training data")
    parser.add_argument(
        "--classes", metavar="0-9,12", help="default: the first ten, or all with --num-images"
    )
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        "--per-class", type=int, default=8, metavar="N", help="default: 8; a picture has 16"
    )
    number.add_argument(
        "--num-images", type=int, metavar="N", help="so many images of classes drawn at random"
    )
    parser.add_argument(
        "--cfg-scale", type=float, default=1.5, metavar="S", help="default: 1.5; no guidance: 1"
    )
    parser.add_argument(
        "--cfg-channels", type=int, metavar="N", help="default: all are guided; as published: 3"
    )
    parser.add_argument("--guidance-interval", default="0,1", metavar="LOW,HIGH")
    parser.add_argument(
        "--sampler", choices=get_args(Sampler), help="default: ddpm, or euler where that was a flow"
    )
    parser.add_argument("--steps", type=int, default=250, metavar="N", help="default: 250")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM's noise, 0 (default) to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), metavar="GRID.png")
    parser.add_argument(
        "--npz", type=Path, metavar="FILE", help="all images and labels, in one file"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    args = parser.parse_args(arguments)
    if distributed.launched():
        distributed.init()
    began = time.perf_counter()
    try:
        with distributed.agreed():
            weights = export.load(args.weights) if args.weights else None
        if weights is None:
            weights = export.from_run(args.run)
        about = weights.about
        with distributed.agreed():
            objective = sampling.objective_of(about)
            settings = SamplerSettings(
                sampler=args.sampler or default_sampler(objective),
                steps=args.steps,
                eta=args.eta,
                cfg_scale=args.cfg_scale,
                cfg_channels=args.cfg_channels,
                guidance_interval=sampling.parse_interval(args.guidance_interval),
                seed=args.seed,
                batch_size=args.batch_size,
            )
            check(settings, objective, latent_shape=about.latent_shape)
            classes = parse_choice(args, about)
            num = args.num_images or len(classes) * args.per_class
            if distributed.is_main():
                sampling.check_outputs(args.out, args.npz, num=num, image_shape=about.image_shape)
            vae = latents.load_vae(args.vae or about.vae, device=distributed.device())
            found = latents.latent_shape(vae, about.image_shape)
            if found != about.latent_shape:
                raise ValueError(
                    f"--vae {args.vae or about.vae}: its latents are of {found}, the model's of "
                    f"{about.latent_shape}; give the VAE that the training data was made with"
                )
            model = weights.build(distributed.device())
        vae_hash = latents.vae_hash(vae)
        distributed.agree_on("the VAE", vae_hash)
        if about.vae_sha256 and vae_hash != about.vae_sha256:
            distributed.print_main(
                "WARNING: this is not the VAE that the training data was made with"
            )
        if args.num_images:
            labels = sampling.random_labels(classes, num, args.seed)
        else:
            labels = torch.tensor(classes).repeat_interleave(args.per_class)
        images = sampling.draw(model, about, settings, vae, labels)
        num_shown = sampling.write(images, labels, about.image_shape, args.out, args.npz)
    except ValueError as error:
        distributed.exit_with(error)
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; nothing was written\n")
    if distributed.is_main():
        seconds = time.perf_counter() - began
        print(
            f"{args.out}: {num_shown} images of step {about.step}, {settings.sampler} "
            f"{args.steps} steps, guidance {args.cfg_scale}, {seconds:.1f} s"
        )
        if args.npz:
            print(f"{args.npz}: all {len(labels)} images, arr_0, and their labels")
        if args.json:
            facts = {"out": str(args.out), "images": len(labels), "step": about.step}
            print(json.dumps(facts | {"seconds": round(seconds, 3)}), flush=True)
    distributed.shutdown()


def parse_choice(args: argparse.Namespace, about: export.Description) -> list[int]:
    """The classes to make images of."""
    most = about.num_classes if args.num_images else min(10, about.num_classes)
    classes = sampling.parse_classes(args.classes or f"0-{most - 1}", about.num_classes)
    for option, value in (("--per-class", args.per_class), ("--num-images", args.num_images)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} must be at least 1")
    if args.npz is None and (args.num_images or max(len(classes), args.per_class) > GRID_SIDE):
        raise ValueError(
            f"the picture shows at most {GRID_SIDE} classes and {GRID_SIDE} images of each; give "
            "--npz FILE for all of them, or ask for fewer"
        )
    return classes


if __name__ == "__main__":
    main()
