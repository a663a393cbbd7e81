"""Images <-> VAE moments <-> latents: crop, encode, sample, scale, shift, decode.

Moments are what diffusers' `AutoencoderKL` computes, mean and log-variance joined along the
channels (N, 2C, h, w), unscaled; latents z (N, C, h, w) are what the model learns on, scaled to
about unit variance.

Sources: Dhariwal & Nichol 2021 (ADM), whose centre crop the field compares on; Rombach et al.
2022, section 3.1 and appendix G (the scaling of latents); Esser et al. 2024 (the shift).
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:  # importing diffusers takes 4 s; only `load_vae` pays them
    from diffusers import AutoencoderKL

# What images are stored as. Pillow knows more, some by other programs: Ghostscript for PostScript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MAX_16_BIT = 65535
_MAX_ENLARGED = 1 << 28  # pixels; 800 MB


class Picture(NamedTuple):
    """An image as RGB, upright; the colour mode it was stored in; whether it has more frames."""

    image: Image.Image
    mode: str
    animated: bool


def read_image(source: str | Path | bytes, name: str = "") -> Picture:
    """The image in a file, or in the bytes of one, as RGB, upright.

    Alpha is laid over white, 16-bit grey is scaled to 8 bits, an animation gives its first frame,
    an EXIF orientation that cannot be read counts as none. What Pillow cannot read to its end, or
    finds so large that it must be an attack (`Image.MAX_IMAGE_PIXELS`, twice), raises a ValueError
    that says `name`, or the path.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with warnings.catch_warnings():  # of odd metadata, thousands of them
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_FORMATS) as stored:
                stored.load()
                # Phones store stereo pairs and gain maps as MPO: to everybody a photograph.
                animated = getattr(stored, "is_animated", False) and stored.format != "MPO"
                return Picture(_to_rgb(_upright(stored)), stored.mode, animated)
    except Exception as error:  # Pillow's decoders raise a dozen kinds on broken data
        who = name or ("image" if isinstance(source, bytes) else str(source))
        raise ValueError(f"{who}: cannot be read as an image: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(_FORMATS)}"  # its own words hold an address in memory
    return str(error) or type(error).__name__


def load_image(path: str | Path) -> Image.Image:
    """The image in `path` as RGB, upright. See `read_image`."""
    return read_image(path).image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF: every viewer shows it as it is stored
        return image


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

    Raises:
        ValueError: so narrow that, enlarged, it would fill the memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    if wide * high > _MAX_ENLARGED:
        raise ValueError(f"{image.width}x{image.height} pixels are too narrow to crop {size} of")
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
        cause: BaseException = error
        while below := cause.__cause__ or cause.__context__:
            cause = below
        root = f" (at the root of it: {cause})" if not is_folder and cause is not error else ""
        raise ValueError(
            f"vae={path_or_id}: no AutoencoderKL with safetensors weights can be loaded {where}: "
            f"{error}{root}"
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


def move_vae(vae: AutoencoderKL, device: torch.device, dtype: torch.dtype) -> None:
    """Put a VAE on a device and in a precision, without diffusers' warning that names nothing."""
    torch.nn.Module.to(vae, device, dtype)


def vae_factor(vae: AutoencoderKL) -> int:
    """How many image pixels one latent pixel spans along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(vae: AutoencoderKL, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images; ValueError where the sizes do not fit.

    image_size: pixels of each side of square images, or (H, W).
    """
    factor = vae_factor(vae)
    high, wide = (image_size, image_size) if isinstance(image_size, int) else image_size
    for side in (high, wide):
        if side < 1:
            raise ValueError(f"image_size={side} is not positive; choose a multiple of {factor}")
        if side < factor or side % factor:
            raise ValueError(
                f"image_size={side} is not a multiple of the VAE's factor {factor}; choose "
                f"{max(1, side // factor) * factor} or {(side // factor + 1) * factor}"
            )
    return (vae.config.latent_channels, high // factor, wide // factor)


def vae_name(path_or_id: str | Path) -> str:
    """What to ask for a VAE by later: the hub id, or a folder as it is found from anywhere."""
    return str(Path(path_or_id).resolve()) if Path(path_or_id).is_dir() else str(path_or_id)


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
def encode_on_device(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Moments of images and of their mirror images: (N, size, size, 3) uint8 -> (N, 2, 2C, h, w).

    float16 on the VAE's device, which may still be computing them.
    """
    pixels = images.to(vae.device, non_blocking=True).permute(0, 3, 1, 2)
    x = (pixels.float() / 127.5 - 1.0).to(vae.dtype)  # (N, 3, size, size)
    both = [vae.encode(side).latent_dist.parameters for side in (x, x.flip(3))]
    return torch.stack(both, dim=1).to(torch.float16)


def check_finite(moments: np.ndarray, names: Sequence[str] = ()) -> None:
    """Raise a ValueError for (N, ...) moments that are not finite.

    It names the image, by its place in the batch or by `names`.
    """
    bad = (~np.isfinite(moments).reshape(len(moments), -1).all(1)).nonzero()[0].tolist()
    if bad:
        who = names[bad[0]] if names else f"image {bad[0]} of the batch"
        raise ValueError(
            f"{who}: the VAE's moments are not finite in float16 (or overflow it); check the VAE's "
            "weights, and run it in float32"
        )


def encode(vae: AutoencoderKL, images: np.ndarray, *, names: Sequence[str] = ()) -> np.ndarray:
    """`encode_on_device` and `check_finite`, as numpy: (N, size, size, 3) -> (N, 2, 2C, h, w)."""
    moments = encode_on_device(vae, torch.tensor(images)).cpu().numpy()
    check_finite(moments, names)
    return moments


@torch.no_grad()
def decode(vae: AutoencoderKL, z: torch.Tensor, space: LatentSpace) -> np.ndarray:
    """Images of latents: (N, C, h, w) -> (N, H, W, 3) uint8."""
    x = vae.decode(space.to_vae(z).to(vae.device, vae.dtype)).sample.float()  # (N, 3, H, W)
    pixels = ((x + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def preview_sheet(
    vae: AutoencoderKL, images: Sequence[np.ndarray], names: Sequence[str]
) -> Image.Image:
    """What becomes of (H, W, 3) images: above, the images; below, decoded latents; then mirrored.

    The latents take the whole way: moments in float16, the mean, scaled as a model sees them, back.
    Raises as `encode` does.
    """
    space = LatentSpace.from_vae(vae)
    rows: list[list[np.ndarray]] = [list(images), [], []]
    # One by one, as decoding takes more memory than encoding.
    for image, name in zip(images, names, strict=True):
        moments = torch.from_numpy(encode(vae, image[None], names=[name])[0]).float()
        z = space.sample(moments, torch.zeros_like(moments).chunk(2, dim=1)[0])
        for row, latent in zip(rows[1:], z, strict=True):
            row.append(decode(vae, latent[None], space)[0])
    return image_grid(np.stack([i for row in rows for i in row]), rows=3, columns=len(images))


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
