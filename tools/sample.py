"""Draw images from a run or from exported weights.

    python tools/sample.py --run RUN_DIR --vae PATH_OR_ID --classes 0-9 --per-class 8 --out grid.png
    python tools/sample.py --weights FILE.safetensors --vae PATH_OR_ID --classes 207,360
    deepspeed tools/sample.py ... --npz images.npz   # over all GPUs; the same images

Always the averaged (EMA) weights. Image i of a seed is the same whatever the batch size and the
number of ranks. See `dit_ds.samplers`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from dit_ds import distributed, export, files, latents
from dit_ds.models import DiT
from dit_ds.samplers import SamplerSettings, check, sample

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="its newest checkpoint")
    source.add_argument("--weights", type=Path, metavar="FILE.safetensors", help="an export")
    parser.add_argument("--vae", metavar="PATH_OR_ID", help="default: the one of the training data")
    parser.add_argument("--classes", metavar="0-9,12", help="default: all, at most ten")
    parser.add_argument("--per-class", type=int, default=8, metavar="N")
    parser.add_argument("--cfg-scale", type=float, default=1.5, metavar="S", help="1: no guidance")
    parser.add_argument("--cfg-channels", type=int, metavar="N", help="3: as published; all")
    parser.add_argument("--guidance-interval", default="0,1", metavar="LOW,HIGH")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm")
    parser.add_argument("--steps", type=int, default=250, metavar="N")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM's noise, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), metavar="GRID.png")
    parser.add_argument("--npz", type=Path, metavar="FILE", help="also all images and labels")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    args = parser.parse_args(arguments)
    if "WORLD_SIZE" in os.environ:  # started by a launcher
        distributed.init()
    began = time.perf_counter()
    try:
        with distributed.agreed():
            if args.out.suffix not in (".png", ".jpg", ".webp"):
                raise ValueError(f"--out {args.out}: name a picture, such as grid.png")
            for path in (args.out, args.npz or args.out):
                path.parent.mkdir(parents=True, exist_ok=True)
            weights = export.load(args.weights) if args.weights else None
        if weights is None:
            weights = export.from_run(args.run)
        about = weights.about
        with distributed.agreed():
            classes = parse_classes(args.classes, about.num_classes)
            if args.per_class < 1:
                raise ValueError(f"--per-class {args.per_class} must be at least 1")
            settings = SamplerSettings(
                sampler=args.sampler,
                steps=args.steps,
                eta=args.eta,
                cfg_scale=args.cfg_scale,
                cfg_channels=args.cfg_channels,
                guidance_interval=parse_interval(args.guidance_interval),
                seed=args.seed,
                batch_size=args.batch_size,
            )
            check(settings, latent_shape=about.latent_shape, num_timesteps=about.num_timesteps)
            vae = latents.load_vae(args.vae or about.vae, device=distributed.device())
            if latents.latent_shape(vae, about.image_size) != about.latent_shape:
                raise ValueError(f"--vae {args.vae}: its latents are not those of the model")
            model = weights.build(distributed.device())
    except ValueError as error:
        distributed.exit_with(error)
    if latents.vae_hash(vae) != about.vae_sha256:
        distributed.print_main("WARNING: this is not the VAE that the training data was made with")
    labels = torch.tensor(classes).repeat_interleave(args.per_class)
    images = draw(model, about, settings, vae, labels)
    if distributed.is_main():
        write(args, images, labels, rows=len(classes))
        seconds = time.perf_counter() - began
        print(
            f"{args.out}: {len(labels)} images of {len(classes)} classes at step {about.step}, "
            f"{args.sampler} {args.steps} steps, guidance {args.cfg_scale}, {seconds:.1f} s"
        )
        if args.json:
            facts = {"out": str(args.out), "images": len(labels), "step": about.step}
            print(json.dumps(facts | {"seconds": round(seconds, 3)}), flush=True)
    distributed.shutdown()


def draw(
    model: DiT,
    about: export.Description,
    settings: SamplerSettings,
    vae: AutoencoderKL,
    labels: torch.Tensor,
) -> np.ndarray:
    """(N, size, size, 3) uint8, an image for each label; every rank makes its slice of them."""
    rank, world = distributed.rank(), distributed.world_size()
    slices = torch.arange(len(labels)).tensor_split(world)
    mine = slices[rank]
    z = sample(
        model,
        settings,
        classes=labels[mine],
        latent_shape=about.latent_shape,
        num_classes=about.num_classes,
        image_ids=mine.tolist(),
        num_timesteps=about.num_timesteps,
        learn_sigma=about.model.learn_sigma,
        device=distributed.device(),
        progress=distributed.is_main(),
    )
    space = latents.LatentSpace(about.scaling_factor, about.shift_factor)
    # Slices differ by one image at most; the shorter ones are filled up to be gathered.
    images = torch.zeros(len(slices[0]), about.image_size, about.image_size, 3, dtype=torch.uint8)
    for start in range(0, len(mine), settings.batch_size):
        decoded = latents.decode(vae, z[start : start + settings.batch_size], space)
        images[start : start + len(decoded)] = torch.from_numpy(decoded)
    parts = distributed.gather_tensor(images)
    return torch.cat([p[: len(s)] for p, s in zip(parts, slices, strict=True)]).numpy()


def write(args: argparse.Namespace, images: np.ndarray, labels: torch.Tensor, *, rows: int) -> None:
    """The grid, a row for each class, and all images if they were asked for."""
    sheet = latents.image_grid(images, rows=rows, columns=args.per_class)
    with files.atomic_file(args.out) as file:
        sheet.save(file, format=Image.registered_extensions()[args.out.suffix])
    if args.npz:
        with files.atomic_file(args.npz) as file:
            np.savez(file, images=images, labels=labels.numpy())


def parse_classes(text: str | None, num_classes: int) -> list[int]:
    """Class numbers out of `0-9,12`, each one the data has."""
    if text is None:
        return list(range(min(10, num_classes)))
    classes: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"--classes {text}: expected numbers and ranges, such as 0-9,12")
        classes += range(int(low), int(high if dash else low) + 1)
    wrong = [c for c in classes if c >= num_classes]
    if wrong or not classes:
        raise ValueError(f"--classes {text}: the model knows classes 0-{num_classes - 1}")
    return classes


def parse_interval(text: str) -> tuple[float, float]:
    """Two numbers out of `LOW,HIGH`."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--guidance-interval {text}: expected LOW,HIGH such as 0,1") from None
    return low, high


if __name__ == "__main__":
    main()
