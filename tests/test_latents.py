"""Images <-> moments <-> latents: parity with the published crop, and what users' files do."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dit_ds import latents
from dit_ds.latents import LatentSpace
from dit_ds.sources import IMAGE_SUFFIXES

GOLDEN = Path(__file__).parent / "data" / "dit_tiny.npz"


def tiny_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def images(num: int = 3, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def test_center_crop_is_the_published_one() -> None:
    with np.load(GOLDEN) as golden:
        image, size, expected = golden["crop/in"], int(golden["crop/size"]), golden["crop/out"]
    found = latents.center_crop(Image.fromarray(image), size)
    assert found.dtype == np.uint8 and found.shape == (size, size, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1  # image libraries differ by a level


@pytest.mark.parametrize(("wide", "high"), [(5, 9), (31, 16), (16, 16), (64, 33), (700, 33)])
def test_center_crop_has_its_size_for_any_image(wide: int, high: int) -> None:
    assert latents.center_crop(Image.new("RGB", (wide, high), "red"), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (200, 100, 50), "png", (200, 100, 50)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), "png", (255, 255, 255)),  # what shows through is white
        ("RGBA", (255, 0, 0, 128), "webp", (255, 127, 127)),
        ("LA", (0, 128), "png", (127, 127, 127)),
        ("I;16", 25700, "png", (100, 100, 100)),  # scaled, where Pillow's own convert clips at 255
        ("I;16", 25700, "tif", (100, 100, 100)),
    ],
)
def test_colour_modes(tmp_path: Path, mode: str, colour, suffix: str, expected) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (6, 4), colour).save(path, lossless=True)
    image, stored, animated = latents.read_image(path)
    assert not animated
    assert image.mode == "RGB" and image.size == (6, 4) and stored == mode
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK").save(path, quality=95)
    assert np.abs(np.asarray(latents.load_image(path)).astype(int) - (250, 10, 10)).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_a_transparent_entry(tmp_path: Path, suffix: str) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"image.{suffix}", transparency=0)
    found = np.asarray(latents.load_image(tmp_path / f"image.{suffix}"))
    assert found.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it upright
    stored = Image.new("RGB", (20, 10), "blue")
    stored.paste("white", (0, 0, 10, 10))  # the left half, which becomes the top
    stored.save(tmp_path / "image.png", exif=exif)
    found = np.asarray(latents.load_image(tmp_path / "image.png"))
    assert found.shape == (20, 10, 3)
    assert (found[:10] == 255).all() and (found[10:] == (0, 0, 255)).all()


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert latents.load_image(tmp_path / "image.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif"])
def test_truncated_images_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken.{suffix}"
    Image.fromarray(images(1, 64)[0]).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"broken.{suffix}: cannot be read as an image"):
        latents.load_image(path)


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")  # as Ghostscript
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.eps")
    (tmp_path / "cat.eps").rename(tmp_path / "cat.jpg")
    with pytest.raises(ValueError, match="cat.jpg: cannot be read as an image: none of JPEG, PNG"):
        latents.load_image(tmp_path / "cat.jpg")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_what_is_listed_as_an_image_can_be_read(tmp_path: Path, suffix: str) -> None:
    Image.new("L", (4, 4)).save(tmp_path / f"image{suffix}")
    assert latents.load_image(tmp_path / f"image{suffix}").size == (4, 4)


def png_of_16_bits(colour_type: int, pixel: tuple[int, ...]) -> bytes:
    """A 4x4 PNG of one colour; Pillow does not write all that it reads."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    row = b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * 4
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


@pytest.mark.parametrize(
    ("colour_type", "pixel", "expected"),
    [
        (0, (25700,), (100, 100, 100)),
        (2, (51400, 25700, 12850), (200, 100, 50)),
        (4, (0, 32896), (127, 127, 127)),  # half transparent black, over white
        (6, (65535, 0, 0, 32896), (255, 127, 127)),
    ],
)
def test_16_bits(colour_type: int, pixel: tuple, expected: tuple) -> None:
    found = latents.read_image(png_of_16_bits(colour_type, pixel)).image
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1


def stored(suffix: str, image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def test_several_frames_are_told_but_not_a_photograph_s_second_view() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for suffix, animated in {"GIF": True, "PNG": True, "WEBP": True, "MPO": False}.items():
        content = stored(suffix, frames[0], save_all=True, append_images=frames[1:])
        assert latents.read_image(content).animated == animated, suffix
    assert not latents.read_image(stored("GIF", frames[0])).animated


def test_exif_that_cannot_be_read_is_none() -> None:
    content = stored("JPEG", Image.new("RGB", (20, 10)), exif=b"Exif\0\0garbage")
    assert latents.read_image(content).image.size == (20, 10)


def test_images_that_would_fill_the_memory_are_refused() -> None:
    bomb = stored("PNG", Image.new("1", (20000, 10000)))
    with pytest.raises(ValueError, match="a.png: cannot be read .*200000000 pixels.* bomb"):
        latents.read_image(bomb, "a.png")
    with pytest.raises(ValueError, match="1x60000 pixels are too narrow to crop 256"):
        latents.center_crop(Image.new("RGB", (1, 60000)), 256)


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match="broken.png: cannot be read"):
        latents.load_image(tmp_path / "broken.png")


@pytest.mark.parametrize(("mode", "colour"), [("F", 0.5), ("I", 70000), ("I", -1)])
def test_pixels_without_an_agreed_range_are_refused(tmp_path: Path, mode: str, colour) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match="depth.tif.*store 8 or 16 bits"):
        latents.load_image(tmp_path / "depth.tif")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent_channels": 16, "shift_factor": 0.5, "scaling_factor": 0.3},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {
            "block_out_channels": (8,),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
        },
    ],
)
def test_moments_and_images_agree_with_diffusers(tmp_path: Path, changes: dict) -> None:
    tiny_vae(**changes).save_pretrained(tmp_path)
    vae = latents.load_vae(tmp_path)
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.training
    batch = images()
    moments = latents.encode(vae, batch)
    channels, high, wide = latents.latent_shape(vae, 16)
    assert moments.shape == (3, 2, 2 * channels, high, wide) and moments.dtype == np.float16
    space = LatentSpace.from_vae(vae)
    for side, pixels in enumerate((batch, batch[:, :, ::-1])):
        x = torch.from_numpy(pixels.transpose(0, 3, 1, 2) / 127.5 - 1).float()
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
        half = torch.from_numpy(moments[:, side]).float()
        eps = torch.randn_like(posterior.mean)
        expected = posterior.mean + posterior.std * eps
        z = space.sample(half, eps)
        # fp16 keeps 11 bits of values of order 1
        torch.testing.assert_close(space.to_vae(z), expected, rtol=0, atol=5e-3)
    z = (posterior.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    with torch.no_grad():
        reference = vae.decode(posterior.mean).sample.permute(0, 2, 3, 1) * 127.5 + 127.5
    found = latents.decode(vae, z, space)
    assert found.shape == (3, 16, 16, 3) and found.dtype == np.uint8
    assert np.abs(found - reference.clamp(0, 255).numpy()).max() <= 0.51  # rounding


def test_sample_scales_shifts_and_clamps() -> None:
    moments = torch.cat([torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 100.0)], dim=1)
    eps = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
    z = LatentSpace(scaling_factor=0.5, shift_factor=1.0).sample(moments, eps)
    assert z.flatten().tolist() == pytest.approx([1.0, (2.0 + np.exp(10.0)) * 0.5])


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_moments_that_are_not_finite_name_the_image(value: float) -> None:
    vae = tiny_vae()
    torch.nn.init.constant_(vae.quant_conv.bias, value)  # 1e6 is finite, but not in float16
    with pytest.raises(ValueError, match="cat.png.*not finite in float16"):
        latents.encode(vae, images(), names=["cat.png", "dog.png", "cow.png"])


def test_vae_hash_is_of_the_weights(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    assert latents.vae_hash(latents.load_vae(tmp_path)) == latents.vae_hash(vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1
    assert latents.vae_hash(latents.load_vae(tmp_path)) != latents.vae_hash(vae)


def test_image_size_must_fit_the_vae() -> None:
    assert latents.latent_shape(tiny_vae(), 16) == (4, 8, 8)
    with pytest.raises(ValueError, match="image_size=17.*factor 2; choose 16 or 18"):
        latents.latent_shape(tiny_vae(), 17)


def test_load_vae_says_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="vae=/no/such/folder: no such folder"):
        latents.load_vae("/no/such/folder")
    with pytest.raises(ValueError, match=f"vae={tmp_path}: no AutoencoderKL"):
        latents.load_vae(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="vae=nobody/nothing: .* nor on the hub"):
        latents.load_vae("nobody/nothing")


def test_load_vae_refuses_pickles_and_other_models(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match="safetensors"):
        latents.load_vae(tmp_path / "pickled")
    vae.decoder = torch.nn.Identity()
    vae.save_pretrained(tmp_path / "incomplete")
    with pytest.raises(ValueError, match="lack .* parameters of an AutoencoderKL"):
        latents.load_vae(tmp_path / "incomplete")
    grey = tiny_vae(in_channels=1, out_channels=1)
    grey.save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match="takes 1 image channels; give one for RGB"):
        latents.load_vae(tmp_path / "grey")


def test_image_grid_enlarges_small_images_without_blur() -> None:
    batch = images(3, 8)
    sheet = np.asarray(latents.image_grid(batch, rows=2, columns=2))
    assert sheet.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    tile = sheet[68:132, 2:66]  # the third image, below the first
    assert np.array_equal(tile[::8, ::8], batch[2]) and np.array_equal(tile[7::8, 7::8], batch[2])
    assert (sheet[68:, 68:] == 255).all()
    with pytest.raises(ValueError, match="3 images do not fit 1 rows x 2 columns"):
        latents.image_grid(batch, rows=1, columns=2)
