"""The quickstart's own parts: real images, a VAE for them, and a report on what was generated.

scikit-learn's handwritten digits (1,797 images of 8x8) are small enough for the whole path, from
image files to samples, to run in minutes on two CPU cores; everything between is the package as
it is used for large images.

    python -m dit_ds.digits images --out runs/quickstart/images
    python -m dit_ds.digits vae    --images runs/quickstart/images --out runs/quickstart/vae
    python -m dit_ds.digits report --images runs/quickstart/images --vae runs/quickstart/vae \
        --generated runs/quickstart/generated.npz --out runs/quickstart/report.json

The VAE and the DiT learn from all the digits. The classifier of the report learns from one half
of the real ones and never sees a generated or a reconstructed image.

Sources: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models" (the
VAE and its scaling factor); Heusel et al. 2017, "GANs trained by a two time-scale update rule",
eq. 6 (the Frechet distance).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from dit_ds import files

NUM_CLASSES = 10
VAE_STEPS = 1000
VAE_BATCH = 64
# Of the KL divergence against the squared error, both summed over an image. The decoder learns to
# shrug off this much posterior noise, and with it the small errors of a sampled latent.
VAE_KL_WEIGHT = 0.02


def write_images(out: Path) -> int:
    """Write the digits as grey PNG files `out/CLASS/NNNN.png`; returns how many there are.

    The folder appears under its name only when it is complete.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    with aside(out) as folder:
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            path = folder / str(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)
    return len(digits.target)


def read_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8, 3) uint8 and labels (N,) int64 of `folder/CLASS/*.png`, in name order.

    Raises:
        ValueError: `folder` holds no such file.
    """
    paths = sorted(folder.glob("[0-9]/*.png"))
    if not paths:
        raise ValueError(
            f"--images {folder}: no CLASS/*.png in it; make it with "
            f"`python -m dit_ds.digits images --out {folder}`"
        )
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return images, np.array([int(path.parent.name) for path in paths], np.int64)


@contextlib.contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `out` only once the block has succeeded."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # a broken attempt's
    partial.mkdir(parents=True)
    yield partial
    os.replace(partial, out)


# --- the VAE -------------------------------------------------------------------------------------


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(x: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8."""
    x = ((x + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return x.permute(0, 2, 3, 1).numpy()


def new_vae() -> Any:
    """An untrained diffusers `AutoencoderKL`: (3, 8, 8) images to (4, 4, 4) latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=8,
    )


def train_vae(
    images: np.ndarray,
    *,
    steps: int = VAE_STEPS,
    kl_weight: float = VAE_KL_WEIGHT,
    log: Callable[[str], None] = print,
) -> Any:
    """Train a VAE on `images` (N, 8, 8, 3) and measure its `scaling_factor`; returns it.

    Squared error plus a little KL divergence. The number of steps is fixed, so that the same
    machine makes the same VAE.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae, x = new_vae().to(device), to_tensor(images).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        batch = x[torch.randint(len(x), (VAE_BATCH,)).to(device)]  # (B, 3, 8, 8)
        posterior = vae.encode(batch).latent_dist  # mean, logvar: (B, 4, 4, 4)
        decoded = vae.decode(posterior.sample()).sample  # (B, 3, 8, 8)
        error = F.mse_loss(decoded, batch, reduction="sum") / len(batch)
        kl = posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        (error + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            log(
                f"  step {step}/{steps}  squared error/pixel {error.item() / batch[0].numel():.5f}"
                f"  KL {kl.item():.1f}  {time.monotonic() - started:.0f} s"
            )
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / encode(vae, images).std().item())
    return vae.cpu()


def encode(vae: Any, images: np.ndarray) -> torch.Tensor:
    """(N, 4, 4, 4) unscaled latents of `images` (N, 8, 8, 3), sampled from the posterior."""
    generator = torch.Generator(vae.device).manual_seed(0)
    with torch.inference_mode():
        posterior = vae.encode(to_tensor(images).to(vae.device)).latent_dist
        return posterior.sample(generator)


def reconstruct(vae: Any, images: np.ndarray) -> np.ndarray:
    """`images` (N, 8, 8, 3) uint8 encoded, sampled as in training the DiT, and decoded."""
    with torch.inference_mode():
        return to_images(vae.decode(encode(vae, images)).sample)


# --- the report ----------------------------------------------------------------------------------


def grey(images: np.ndarray) -> np.ndarray:
    """(N, 8, 8, 3) uint8 -> (N, 64) float64 in [0, 1]: the mean of the channels."""
    return images.reshape(len(images), -1, 3).mean(-1) / 255


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two disjoint random halves of equal size, each with the same mix of classes."""
    rng = np.random.default_rng(0)
    first, second = [], []
    for c in np.unique(labels):
        shuffled = rng.permutation(np.flatnonzero(labels == c))
        middle = len(shuffled) // 2
        first.append(shuffled[:middle])
        second.append(shuffled[middle : 2 * middle])
    return np.concatenate(first), np.concatenate(second)


def train_classifier(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A support vector machine on pixels; returns images (N, 8, 8, 3) -> labels (N,)."""
    from sklearn.svm import SVC

    machine = SVC(C=10, gamma=0.2).fit(grey(images), labels)
    return lambda unseen: machine.predict(grey(unseen))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between the Gaussians fitted to `a` (N, D) and `b` (M, D).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The last trace is taken from the symmetric
    C_a^(1/2) C_b C_a^(1/2), whose eigenvalues are the same, so singular covariances do no harm.
    It is biased upwards by a term of order 1/N: compare only distances of equal N. Source:
    Heusel et al. 2017, eq. 6.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    mean_term = np.square(a.mean(0) - b.mean(0)).sum()
    return float(mean_term + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(shared).sum())


def make_report(
    images: np.ndarray,
    labels: np.ndarray,
    generated: np.ndarray,
    asked: np.ndarray,
    vae: Any,
) -> dict[str, float | int]:
    """Compare `generated` (G, 8, 8, 3), asked for as `asked` (G,), with the real `images`.

    The classifier learns from one half of the real digits. It is asked about the generated ones,
    about the other half, and about that half's VAE reconstructions, which is the ceiling. Both
    Frechet distances use the same number of images on each side.
    """
    first, second = halves(labels)
    classify = train_classifier(images[first], labels[first])
    share = {
        "class_accuracy": classify(generated) == asked,
        "class_accuracy_of_reconstructions": (
            classify(reconstruct(vae, images[second])) == labels[second]
        ),
        "class_accuracy_of_real": classify(images[second]) == labels[second],
    }
    num = min(len(generated), len(second))
    rng = np.random.default_rng(0)
    fake, one, other = (
        grey(pool[rng.permutation(len(pool))[:num]])
        for pool in (generated, images[first], images[second])
    )
    return {
        **{key: round(float(hits.mean()), 4) for key, hits in share.items()},
        "frechet_distance": round(frechet_distance(fake, other), 4),
        "frechet_distance_real_halves": round(frechet_distance(one, other), 4),
        "frechet_num_images": num,
        "num_generated": len(generated),
    }


def read_generated(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (G, 8, 8, 3) uint8 and labels (G,) of the file that `tools/sample.py` wrote.

    Raises:
        ValueError: the file is missing, damaged or of another shape.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            images, labels = data["arr_0"], data["labels"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--generated {path}: cannot be read ({error}); make it with "
            f"`python tools/sample.py --npz {path} ...`"
        ) from error
    if images.shape[1:] != (8, 8, 3) or images.dtype != np.uint8 or len(images) < 2:
        raise ValueError(
            f"--generated {path}: images are {images.dtype} {images.shape}; "
            "digits are uint8 (G, 8, 8, 3) with G of at least 2"
        )
    return images, labels


def format_report(report: dict[str, float | int]) -> str:
    """The report as a few lines for people."""

    def percent(key: str) -> str:
        return f"{100 * report[key]:5.1f} %"

    lines = {
        "generated digits read as the digit asked for": percent("class_accuracy"),
        "  reconstructions of real digits (the ceiling)": percent(
            "class_accuracy_of_reconstructions"
        ),
        "  real digits": percent("class_accuracy_of_real"),
        "Frechet distance, generated to real": f"{report['frechet_distance']:7.4f}",
        "  one half of the real to the other": f"{report['frechet_distance_real_halves']:7.4f}",
        "seconds for the whole job": f"{report['seconds']:5.0f}",
    }
    return "\n".join(
        [f"{name:<46} {value}" for name, value in lines.items()]
        + [
            f"({report['num_generated']} generated digits; the distances are of 64 pixels in "
            f"[0, 1], {report['frechet_num_images']} images on each side)"
        ]
    )


# --- the commands --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run one of the three commands; a user's mistake prints one sentence and exits with 2."""
    args = parse(argv)
    try:
        {"images": run_images, "vae": run_vae, "report": run_report}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. A product that is there already is kept."""
    parser = argparse.ArgumentParser(prog="python -m dit_ds.digits", description="Digits demo")
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser("images", help="write the digits as PNG files in class folders")
    vae = commands.add_parser("vae", help="train a small VAE on them")
    report = commands.add_parser("report", help="judge generated digits")
    for command in (vae, report):
        command.add_argument("--images", type=Path, required=True, metavar="DIR")
    report.add_argument("--vae", type=Path, required=True, metavar="DIR")
    report.add_argument("--generated", type=Path, required=True, metavar="FILE.npz")
    report.add_argument(
        "--seconds", type=float, default=0.0, help="what the steps before this one took"
    )
    for command in (images, vae, report):
        command.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def run_images(args: argparse.Namespace) -> None:
    """`images`: write the data."""
    if args.out.exists():
        print(f"{args.out} is there already")
    else:
        print(f"{write_images(args.out)} digits in {args.out}")


def run_vae(args: argparse.Namespace) -> None:
    """`vae`: train and save in diffusers' layout."""
    if args.out.exists():
        print(f"{args.out} is there already")
        return
    images, _ = read_images(args.images)
    vae = train_vae(images)
    with aside(args.out) as folder:
        vae.save_pretrained(folder)
    error = np.abs(reconstruct(vae, images).astype(float) - images).mean()
    print(
        f"VAE in {args.out}: scaling_factor {vae.config.scaling_factor:.4f}, "
        f"mean error of a reconstruction {error:.1f} of 255"
    )


def run_report(args: argparse.Namespace) -> None:
    """`report`: print the figures and write them as JSON."""
    from diffusers import AutoencoderKL

    started = time.monotonic()
    images, labels = read_images(args.images)
    generated, asked = read_generated(args.generated)
    vae = AutoencoderKL.from_pretrained(args.vae, local_files_only=True, low_cpu_mem_usage=False)
    report = make_report(images, labels, generated, asked, vae)
    report["seconds"] = math.ceil(args.seconds + time.monotonic() - started)
    print(format_report(report))
    files.write_atomically(args.out, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
