"""Class folders to a dataset: the same bytes for any number of ranks, and clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dit_ds import distributed, latents
from dit_ds.extract import extract, list_class_folders
from dit_ds.manifest import Folder, Manifest
from dit_ds.shards import ShardReader
from tests.conftest import run_ranks

TOOL = Path(__file__).parents[1] / "tools" / "precompute_latents.py"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.3,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return str(folder)


def make_images(root: Path, *, classes: int = 3, each: int = 7, side: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class {c}" / "deeper").mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (side, side + i, 3), dtype=np.uint8)
            where = root / f"class {c}" / ("deeper" if i == 1 else ".")
            Image.fromarray(pixels).save(where / f"{i}.{'JPG' if i == 2 else 'png'}")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make(images: Path, vae: str, out: Path, **options):
    return extract(images, vae, 16, out, **{"batch_size": 3, "samples_per_shard": 4, **options})


def test_samples_are_the_moments_of_the_listed_images(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images")
    done = make(images, vae, tmp_path / "out")
    listing = list_class_folders(images)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == done.manifest
    assert manifest.class_names == ("class 0", "class 1", "class 2")
    assert [s.num_samples for s in manifest.shards] == [4, 4, 4, 4, 4, 1]
    assert (manifest.latent_shape, manifest.image_size) == ((16, 8, 8), 16)
    assert (manifest.scaling_factor, manifest.shift_factor) == (0.3, 0.1)
    model = latents.load_vae(vae)
    assert manifest.vae.sha256 == latents.vae_hash(model)
    sample = 0
    for info in manifest.shards:
        reader = ShardReader(Folder(tmp_path / "out"), info, manifest)
        for row in range(info.num_samples):
            path = Path(listing.paths[sample])
            assert f"class {reader.label(row)}" in path.parts
            crop = latents.center_crop(latents.load_image(path), 16)
            expected = latents.encode(model, crop[None])[0]
            for flip in (0, 1):
                found = reader.moments(np.array([row]), np.array([flip]))[0]
                # fp16 rounds to 2^-11; a batch of another size moves the last bits of fp32
                np.testing.assert_allclose(found, expected[flip], rtol=2e-3, atol=2e-3)
            sample += 1
    assert sample == manifest.num_samples == 21


def test_shards_mix_classes_and_the_listing_ignores_the_folder_s_place(tmp_path: Path) -> None:
    a = list_class_folders(make_images(tmp_path / "a", classes=4, each=16))
    b = list_class_folders(make_images(tmp_path / "elsewhere", classes=4, each=16))
    assert a.labels == b.labels
    assert len(set(a.labels[:16])) == 4
    assert sorted(a.labels) == sorted([0, 1, 2, 3] * 16)


def _extract_on_a_rank(images: Path, vae: str, out: Path) -> str:
    distributed.init()
    try:
        make(images, vae, out)
        return "done"
    except distributed.RankError as error:
        return str(error)
    finally:
        distributed.shutdown()


def test_two_ranks_make_the_bytes_of_one(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images")
    (one,) = run_ranks(1, _extract_on_a_rank, images, vae, tmp_path / "one")  # as many threads
    assert one == "done"
    told = run_ranks(2, _extract_on_a_rank, images, vae, tmp_path / "two")
    assert told == ["done", "done"]
    assert len(contents(tmp_path / "one")) == 7
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_broken_image_on_one_rank_stops_both(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images")
    fifth = Path(list_class_folders(images).paths[5])  # in rank 1's first shard
    fifth.write_bytes(fifth.read_bytes()[:100])
    for message in run_ranks(2, _extract_on_a_rank, images, vae, tmp_path / "out"):
        assert f"{fifth}: cannot be read" in message and "(rank 1 on " in message
    assert not (tmp_path / "out" / "manifest.json").exists()


def _extract_of_another_folder_on_each_rank(images: Path, vae: str, out: Path) -> str:
    distributed.init()
    return _extract_on_a_rank(images / str(distributed.rank()), vae, out)


def test_ranks_that_see_other_images_are_refused(tmp_path: Path, vae: str) -> None:
    for rank in range(2):
        make_images(tmp_path / "images" / str(rank), each=3 + rank)
    folders = (tmp_path / "images", vae, tmp_path / "out")
    for message in run_ranks(2, _extract_of_another_folder_on_each_rank, *folders):
        assert "the ranks differ in images: 9 in 3 classes" in message and "12 in 3" in message
    assert contents(tmp_path / "out") == {}


def test_all_broken_images_of_a_shard_are_named_and_nothing_is_half_written(
    tmp_path: Path, vae: str
) -> None:
    images = make_images(tmp_path / "images")
    broken = [list_class_folders(images).paths[i] for i in (4, 7)]
    for path in broken:
        Path(path).write_bytes(b"")
    with pytest.raises(ValueError, match="repair or remove") as caught:
        make(images, vae, tmp_path / "out")
    assert all(path in str(caught.value) for path in broken)
    assert list(contents(tmp_path / "out")) == ["latents-000000.tar"]  # and no manifest


def test_what_was_changed_or_skipped_is_counted(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images", classes=1, each=2)
    folder = images / "class 0"
    Image.new("L", (9, 30)).save(folder / "small grey.png")
    Image.new("CMYK", (16, 16)).save(folder / "print.tif")
    Image.new("RGBA", (15, 15)).save(folder / "alpha.webp")
    for name in ("labels.csv", ".DS_Store", "deeper/README"):
        (folder / name).write_text("not an image")
    (images / "notes.txt").write_text("not an image")
    (images / ".cache").mkdir()
    done = make(images, vae, tmp_path / "out")
    assert done.manifest.num_samples == 5
    assert done.num_enlarged == 2
    assert done.num_converted == {"CMYK": 1, "L": 1, "RGBA": 1}
    assert done.num_skipped == 3


def test_a_listing_without_classes_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images=.*nowhere: no such folder"):
        list_class_folders(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no class folders"):
        list_class_folders(tmp_path)
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="1 of 1 class folders hold no images .first: cats"):
        list_class_folders(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="1 images .first: stray.png. lie outside of class fold"):
        list_class_folders(tmp_path)


def test_mistakes_are_told_before_any_work(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images", classes=1), tmp_path / "out"
    with pytest.raises(ValueError, match="image_size=15 is not a multiple of the VAE's factor 2"):
        extract(images, vae, 15, out)
    with pytest.raises(ValueError, match="batch_size=0 is not positive"):
        make(images, vae, out, batch_size=0)
    with pytest.raises(ValueError, match="vae=nothing: no such folder"):
        make(images, "nothing", out)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(ValueError, match="out: the folder cannot be made .File exists.; choose"):
        make(images, vae, out)


def test_an_existing_dataset_is_kept_and_leftovers_are_replaced(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images"), tmp_path / "out"
    out.mkdir()
    for name in ("latents-000000.tar", "latents-000002.tar.tmp", "latents-000099.tar"):
        (out / name).write_bytes(b"of a killed run")
    (out / "notes.txt").write_text("of the user")
    make(images, vae, out)
    before = contents(out)
    assert sorted(before) == [f"latents-{i:06d}.tar" for i in range(6)] + [
        "manifest.json",
        "notes.txt",
    ]
    with pytest.raises(ValueError, match="already holds a dataset; remove it or choose another"):
        make(images, vae, out)
    assert contents(out) == before


def test_moments_that_are_not_finite_name_the_image(tmp_path: Path, vae: str) -> None:
    model = latents.load_vae(vae)
    torch.nn.init.constant_(model.quant_conv.bias, float("nan"))
    model.save_pretrained(tmp_path / "vae")
    images = make_images(tmp_path / "images", classes=1)
    with pytest.raises(ValueError, match=r"class 0/.*: the VAE's moments are not finite"):
        make(images, str(tmp_path / "vae"), tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def run_tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_tool_from_any_folder(tmp_path: Path, vae: str) -> None:
    make_images(tmp_path / "images")
    options = ("--images", "images", "--image-size", 16, "--vae", vae, "--out", "out")
    done = run_tool(*options, "--samples-per-shard", 8, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    manifest = Manifest.load(tmp_path / "out")
    assert (facts["num_samples"], facts["num_shards"], facts["num_classes"]) == (21, 3, 3)
    assert facts["fingerprint"] == manifest.fingerprint
    assert "21 images in 3 classes, latents 16x8x8" in done.stdout
    again = run_tool(*options, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.splitlines() == [
        "error: out=out: already holds a dataset; remove it or choose another"
    ]
