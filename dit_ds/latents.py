"""Images <-> VAE moments <-> latents: crop, encode, sample, scale, shift, decode.

Moments are what diffusers' `AutoencoderKL` computes, mean and log-variance joined along the
channels (N, 2C, h, w), unscaled; latents z (N, C, h, w) are what the model learns on, scaled to
about unit variance.

Sources: Dhariwal & Nichol 2021 (ADM), whose centre crop the field compares on; Rombach et al.
2022, section 3.1 and appendix G (the scaling of latents); Esser et al. 2024 (the shift).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

if TYPE_CHECKING:  # importing diffusers takes 4 s; only `load_vae` pays them
    from diffusers import AutoencoderKL

_MAX_16_BIT = 65535


def read_image(path: str | Path) -> tuple[Image.Image, str]:
    """The image in `path` as RGB, upright, and the colour mode it was stored in.

    Alpha is laid over white, 16-bit grey is scaled to 8 bits, an animation gives its first frame.
    A file that Pillow cannot read to its end raises a ValueError that names it.
    """
    try:
        with Image.open(path) as stored:
            mode = stored.mode
            return _to_rgb(ImageOps.exif_transpose(stored)), mode
    except Exception as error:  # Pillow's decoders raise a dozen kinds on broken data
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def load_image(path: str | Path) -> Image.Image:
    """The image in `path` as RGB, upright. See `read_image`."""
    return read_image(path)[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; store 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's names for 16-bit grey, by version: I;16, I;16B, I
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > _MAX_16_BIT:
            raise ValueError("32-bit grey has no agreed range; store 8 or 16 bits")
        image = Image.fromarray(np.rint(grey * (255 / _MAX_16_BIT)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The ADM centre crop: (size, size, 3) uint8. Smaller images are enlarged.

    Halved by boxes while the short side stays at least twice `size`, resized so that the short side
    is `size`, cut from the middle. Source: Dhariwal & Nichol 2021, the code beside the paper.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def load_vae(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AutoencoderKL:
    """A frozen `AutoencoderKL` from a folder in diffusers' layout or from a hub id.

    Only safetensors are read, never pickles. A ValueError says what is missing.
    """
    is_folder = Path(path_or_id).is_dir()
    if not is_folder and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path_or_id)):
        raise ValueError(
            f"vae={path_or_id}: no such folder, and not a hub id of the form org/name; give the "
            "folder that AutoencoderKL.save_pretrained wrote"
        )
    from diffusers import AutoencoderKL
    from safetensors import SafetensorError

    try:
        vae, report = AutoencoderKL.from_pretrained(
            str(path_or_id),
            torch_dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # the other way needs accelerate and saves nothing here
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "in this folder" if is_folder else "here as a folder, nor on the hub by this id"
        raise ValueError(
            f"vae={path_or_id}: no AutoencoderKL with safetensors weights can be loaded {where}: "
            f"{error}"
        ) from error
    if report["missing_keys"]:
        raise ValueError(
            f"vae={path_or_id}: its weights lack {len(report['missing_keys'])} parameters of an "
            f"AutoencoderKL (first: {sorted(report['missing_keys'])[0]}); it is another kind of "
            "model or an incomplete copy"
        )
    if vae.config.in_channels != 3:
        raise ValueError(
            f"vae={path_or_id}: takes {vae.config.in_channels} image channels; give one for RGB"
        )
    return vae.to(device).eval().requires_grad_(False)


def vae_factor(vae: AutoencoderKL) -> int:
    """How many image pixels one latent pixel spans along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images; ValueError where the sizes do not fit."""
    factor = vae_factor(vae)
    if image_size < factor or image_size % factor:
        raise ValueError(
            f"image_size={image_size} is not a multiple of the VAE's factor {factor}; choose "
            f"{max(1, image_size // factor) * factor} or {(image_size // factor + 1) * factor}"
        )
    return (vae.config.latent_channels, image_size // factor, image_size // factor)


def vae_hash(vae: AutoencoderKL) -> str:
    """sha256 (hex) of the weights by name, as loaded: another dtype is another hash."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class LatentSpace:
    """How a VAE's own latents become those the model sees: z = (latent - shift) * scale."""

    scaling_factor: float
    shift_factor: float = 0.0

    @classmethod
    def from_vae(cls, vae: AutoencoderKL) -> LatentSpace:
        """The factors in the VAE's configuration; older ones have no shift."""
        return cls(vae.config.scaling_factor, vae.config.shift_factor or 0.0)

    def sample(self, moments: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Posterior sample z (N, C, h, w). moments: (N, 2C, h, w), eps: z's shape, standard normal.

        Source: Kingma & Welling 2014, eq. 10; log-variance clamped as diffusers does.
        """
        mean, logvar = moments.chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
        return (mean + std * eps - self.shift_factor) * self.scaling_factor

    def to_vae(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of scale and shift: what the VAE's decoder takes. (N, C, h, w)."""
        return z / self.scaling_factor + self.shift_factor


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, *, names: Sequence[str] = ()) -> np.ndarray:
    """Moments of images and of their mirror images: (N, size, size, 3) uint8 -> (N, 2, 2C, h, w).

    float16. Moments that are not finite in float16 raise a ValueError that names the image, by its
    place in the batch or by `names`.
    """
    pixels = torch.tensor(images, device=vae.device)
    x = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(vae.dtype)  # (N, 3, size, size)
    both = [vae.encode(side).latent_dist.parameters for side in (x, x.flip(3))]
    moments = torch.stack(both, dim=1).to(torch.float16)
    bad = (~torch.isfinite(moments).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        who = names[bad[0]] if names else f"image {bad[0]} of the batch"
        raise ValueError(
            f"{who}: the VAE's moments are not finite in float16 (or overflow it); check the VAE's "
            "weights, and run it in float32"
        )
    return moments.cpu().numpy()


@torch.no_grad()
def decode(vae: AutoencoderKL, z: torch.Tensor, space: LatentSpace) -> np.ndarray:
    """Images of latents: (N, C, h, w) -> (N, H, W, 3) uint8."""
    x = vae.decode(space.to_vae(z).to(vae.device, vae.dtype)).sample.float()  # (N, 3, H, W)
    pixels = ((x + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def image_grid(images: np.ndarray, *, rows: int, columns: int) -> Image.Image:
    """A sheet of (N, H, W, 3) uint8 images, row by row; cells without an image stay white.

    Small images are enlarged by a whole factor to at least 64 pixels, so that 8x8 can be seen.
    """
    if len(images) > rows * columns:
        raise ValueError(f"{len(images)} images do not fit {rows} rows x {columns} columns")
    zoom, gutter = max(1, math.ceil(64 / min(images.shape[1:3]))), 2
    tiles = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    high, wide = tiles.shape[1] + gutter, tiles.shape[2] + gutter
    sheet = np.full((rows * high + gutter, columns * wide + gutter, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * high + gutter, i % columns * wide + gutter
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return Image.fromarray(sheet)
