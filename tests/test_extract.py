"""Images to a dataset: one plan, the same bytes, whatever happens on the way; clear errors."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dit_ds import distributed, heartbeat, latents
from dit_ds.extract import extract
from dit_ds.manifest import Folder, Manifest
from dit_ds.plan import Plan, find_batch_size
from dit_ds.records import Extraction
from dit_ds.shards import ShardReader
from dit_ds.sources import list_class_folders
from tests.conftest import REPO, _forkserver, hear_ctrl_c, run_ranks
from tests.test_sources import png, write_tar

TOOL = REPO / "tools" / "precompute_latents.py"


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
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def data(folder: Path) -> dict[str, bytes]:
    """All but the preview, whose decoding may differ by the machine's load of libraries."""
    return {name: content for name, content in contents(folder).items() if name != "preview.png"}


SMALL = {"batch_size": 3, "samples_per_shard": 4, "workers": 0}


def make(images: Path | str, vae: str, out: Path, **options) -> Extraction:
    done = extract(images, vae, 16, out, **{**SMALL, **options})
    assert done is not None, "was there already"
    return done


def break_images(root: Path, *places: int) -> list[str]:
    """Cut short the images of these numbers; their names in the listing."""
    listing = list_class_folders(root)
    for place in places:
        path = root / listing.paths[place]
        path.write_bytes(path.read_bytes()[:100])
    return [listing.paths[place] for place in places]


def rejected(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def samples(out: Path) -> list[tuple[str, int]]:
    """Key and label of each sample, in the manifest's order."""
    manifest = Manifest.load(out)
    readers = [ShardReader(Folder(out), info, manifest) for info in manifest.shards]
    return [
        (reader.key(row), reader.label(row))
        for reader, info in zip(readers, manifest.shards, strict=True)
        for row in range(info.num_samples)
    ]


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
    assert samples(tmp_path / "out") == [(f"{i:09d}", y) for i, y in enumerate(listing.labels)]
    sample = 0
    means, stds = [], []
    for info in manifest.shards:
        reader = ShardReader(Folder(tmp_path / "out"), info, manifest)
        for row in range(info.num_samples):
            crop = latents.center_crop(latents.load_image(images / listing.paths[sample]), 16)
            expected = latents.encode(model, crop[None])[0]
            for flip in (0, 1):
                found = reader.moments(np.array([row]), np.array([flip]))[0]
                # fp16 rounds to 2^-11; a batch of another size moves the last bits of fp32
                np.testing.assert_allclose(found, expected[flip], rtol=2e-3, atol=2e-3)
                mean, logvar = np.split(found.astype(np.float64), 2)
                means.append(mean)
                stds.append(np.exp(logvar / 2))
            sample += 1
    assert sample == manifest.num_samples == 21
    statistics = manifest.statistics
    assert statistics is not None
    mean, std = np.array(means), np.array(stds)  # (N, C, h, w)
    total = np.sqrt(mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3)))
    np.testing.assert_allclose(statistics.mean, mean.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(statistics.std, total, rtol=1e-5)
    overall = np.sqrt(mean.var() + (std**2).mean()) * 0.3
    assert done.scaled_std == pytest.approx(overall, rel=1e-5)


def test_shards_mix_classes_and_the_listing_ignores_the_folder_s_place(tmp_path: Path) -> None:
    a = list_class_folders(make_images(tmp_path / "a", classes=4, each=16))
    b = list_class_folders(make_images(tmp_path / "elsewhere", classes=4, each=16))
    assert (a.paths, a.labels) == (b.paths, b.labels)
    assert len(set(a.labels[:16])) == 4
    assert sorted(a.labels) == sorted([0, 1, 2, 3] * 16)


def test_the_preview_shows_images_above_what_becomes_of_them(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images")
    break_images(images, 1)
    make(images, vae, tmp_path / "out", max_rejected=0.1)
    listing = list_class_folders(images)
    sheet = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    # 16 pixels are enlarged to 64. The first unit has four images, one of them broken.
    assert sheet.shape == (3 * 66 + 2, 3 * 66 + 2, 3)
    model = latents.load_vae(vae)
    for column, place in enumerate((0, 2, 3)):
        crop = latents.center_crop(latents.load_image(images / listing.paths[place]), 16)
        tiles = [sheet[2 + 66 * row :, 2 + 66 * column :][:64:4, :64:4] for row in range(3)]
        assert np.array_equal(tiles[0], crop)
        for tile, side in zip(tiles[1:], (crop, crop[:, ::-1]), strict=True):
            x = torch.tensor(side / 127.5 - 1).permute(2, 0, 1)[None].float()
            with torch.no_grad():
                decoded = model.decode(model.encode(x).latent_dist.mean).sample[0]
            expected = (decoded.permute(1, 2, 0) * 127.5 + 127.5).clamp(0, 255).numpy()
            assert np.abs(tile - expected).max() <= 2  # moments in float16


# One plan, the same bytes


def _extract_on_a_rank(images: Path | str, vae: str, out: Path, options: dict) -> str:
    distributed.init()
    try:
        make(images, vae, out, **options)
        return "done"
    except distributed.RankError as error:
        return str(error)
    finally:
        distributed.shutdown()


def begin(whole: Path, out: Path) -> Path:
    """A folder with the plan of another."""
    out.mkdir()
    for name in ("plan.json", "listing.jsonl"):
        if (whole / name).exists():
            shutil.copy(whole / name, out)
    return out


def test_the_bytes_do_not_depend_on_ranks_and_workers(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images")
    break_images(images, 5, 6, 16, 17, 18, 19)  # the last four are a whole shard
    options = {"threads": 1, "max_rejected": 0.5}
    make(images, vae, tmp_path / "whole", **options)
    expected = data(tmp_path / "whole")
    names = [f"latents-{i:06d}.tar" for i in (0, 1, 2, 3, 5)]
    others = ["listing.jsonl", "manifest.json", "plan.json", "rejected.jsonl"]
    assert sorted(expected) == names + others
    for world, workers in ((1, 3), (2, 1), (3, 0)):
        out = begin(tmp_path / "whole", tmp_path / f"{world}-{workers}")
        arguments = (images, vae, out, {**options, "workers": workers})
        assert run_ranks(world, _extract_on_a_rank, *arguments) == ["done"] * world
        assert data(out) == expected


def _extract_in_a_child(images: str, vae: str, out: Path, options: dict) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    make(images, vae, out, **options)


def kill_and_resume(tmp_path: Path, images: str, vae: str, num_kills: int, **options) -> None:
    whole = tmp_path / "whole"
    began = time.monotonic()
    make(images, vae, whole, threads=1, **options)
    out = begin(whole, tmp_path / "out")
    generator = random.Random(0)
    kept: list[int] = []
    latest = 1.5 * (time.monotonic() - began)
    kills = 0
    while kills < num_kills:
        arguments = (images, vae, out, {**options, "workers": kills % 2})
        child = _forkserver.Process(target=_extract_in_a_child, args=arguments)
        child.start()
        last = kills == num_kills - 1 and not any(kept)  # must leave something to keep
        wanted = "work/unit-*.json" if last else "work/lock"
        while child.is_alive() and not list(out.glob(wanted)):
            time.sleep(0.001)
        child.join(0 if last else generator.uniform(0, latest / num_kills))
        child.kill()
        child.join()
        if (out / "manifest.json").exists():  # it was faster: once more, with nothing there
            assert child.exitcode in (0, -signal.SIGKILL)
            assert child.exitcode != 0 or data(out) == data(whole)
            shutil.rmtree(out)
            begin(whole, out)
            continue
        assert child.exitcode == -signal.SIGKILL
        units = len(list(out.glob("work/unit-*.json")))
        if last and not units:  # it was clearing up already: once more
            continue
        kills += 1
        kept.append(units)
    assert any(kept)
    make(images, vae, out, **options)
    assert data(out) == data(whole)
    assert not (out / "work").exists()


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_bytes_after_kills_are_those_of_the_undisturbed(
    tmp_path: Path, vae: str, num_kills: int
) -> None:
    images = make_images(tmp_path / "images", each=40 * num_kills)
    kill_and_resume(tmp_path, str(images), vae, num_kills)


def test_bytes_after_kills_in_remote_tars(tmp_path: Path, vae: str) -> None:
    pattern = make_tars(tmp_path / "tars", num=4, each=30)
    kill_and_resume(tmp_path, f"file://{pattern}", vae, 2, batch_size=2)


def _extract_with_short_waits(images: str, vae: str, out: Path, options: dict) -> None:
    heartbeat._BEAT_SECONDS, heartbeat._SILENT_SECONDS = 0.1, 2
    _extract_on_a_rank(images, vae, out, options)


def start_two(function: Callable[..., Any], *arguments: Any, log: Path) -> list[Any]:
    """Two ranks that work; what each prints stands in `log` with its number."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        target_arguments = (environment, f"{log}{rank}", function, arguments)
        ranks.append(_forkserver.Process(target=_logged, args=target_arguments))
        ranks[-1].start()
    return ranks


def _logged(environment: dict, log: str, function: Callable[..., Any], arguments: tuple) -> None:
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        torch.set_num_threads(1)
        function(*arguments)


def wait_for_units(out: Path, num: int, ranks: list[Any]) -> None:
    """Until so many units are finished, and the ranks are in the midst of the next."""
    while len(list(out.glob("work/unit-*.json"))) < num:
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("lost", "how"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (0, signal.SIGSTOP)]
)
def test_ranks_leave_when_one_is_gone(
    tmp_path: Path, vae: str, lost: int, how: signal.Signals
) -> None:
    images, out = make_images(tmp_path / "images", each=50), tmp_path / "out"
    ranks = start_two(_extract_with_short_waits, images, vae, out, {}, log=tmp_path / "log")
    try:
        wait_for_units(out, 3, ranks)
        os.kill(ranks[lost].pid, how)
        ranks[1 - lost].join(60)
        assert ranks[1 - lost].exitcode == 2
    finally:
        for rank in ranks:
            rank.kill()
    told = (tmp_path / f"log{1 - lost}").read_text()
    what = "is gone" if (lost, how) == (0, signal.SIGKILL) else "has been silent for 2 seconds"
    assert f"error: rank {lost} on {socket.gethostname()} {what}; see what ended it" in told
    assert "Traceback" not in told


def test_bytes_after_kills_of_ranks_one_by_one(tmp_path: Path, vae: str) -> None:
    images, whole = str(make_images(tmp_path / "images", each=36)), tmp_path / "whole"
    make(images, vae, whole, threads=1)
    out = begin(whole, tmp_path / "out")
    for kills, first in enumerate((1, 0)):
        ranks = start_two(_extract_on_a_rank, images, vae, out, {}, log=tmp_path / "log")
        wait_for_units(out, 5 * (kills + 1), ranks)
        ranks[first].kill()
        ranks[first].join()
        ranks[1 - first].join(0.1)  # then the launcher sees it
        ranks[1 - first].kill()
        ranks[1 - first].join()
        assert ranks[first].exitcode == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    assert run_ranks(3, _extract_on_a_rank, images, vae, out, {}) == ["done"] * 3
    assert data(out) == data(whole)


def test_a_second_process_is_refused(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images"), tmp_path / "out"
    (out / "work").mkdir(parents=True)
    hold = "import sys; from dit_ds.files import lock; from pathlib import Path; "
    hold += "held = lock(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(out / "work" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO) as p:
        assert p.stdout and p.stdout.readline()
        with pytest.raises(ValueError, match="out: another extraction is at work there; wait"):
            make(images, vae, out)
    make(images, vae, out)


def test_a_plan_is_kept_or_refused(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images"), tmp_path / "out"
    break_images(images, 0)
    with pytest.raises(ValueError, match="max_rejected"):
        make(images, vae, out, threads=1)
    (tmp_path / "names").write_text("cat\n")
    other = tmp_path / "vae"
    model = latents.load_vae(vae)
    torch.nn.init.constant_(model.quant_conv.bias, 1.0)
    model.save_pretrained(other)
    for change, told in {
        ("batch_size", 2): "batch_size=2, but .* was begun with batch_size=3; go on with that, or",
        ("samples_per_shard", 5): "samples_per_shard=5, but .*=4",
        ("threads", 2): "threads=2, but .*threads=1",
        ("precision", "bf16"): "precision=bf16, but .*=fp32",
        ("classes", tmp_path / "names"): "classes=",
        ("images", images / "class 0"): "images=.*class 0, but .*images",
        ("vae", other): "vae=weights .*, but .* was begun with vae=weights",
    }.items():
        arguments: dict[str, Any] = {"images": images, "vae": vae, "out": out, "max_rejected": 1.0}
        with pytest.raises(ValueError, match=told):
            make(**{**arguments, change[0]: change[1]})
    with pytest.raises(ValueError, match="image_size=18, but .*image_size=16"):
        extract(images, vae, 18, out)
    text = (out / "plan.json").read_text()
    plan = Plan.model_validate_json(text)
    for changed, told in {
        plan.model_copy(update={"device": "Abacus"}).model_dump_json(): "device is .* Abacus",
        text.replace(torch.__version__, "1.0"): "torch is 2.* begun with 1.0",
        "{": "plan.json: not a plan of this version; remove",
    }.items():
        (out / "plan.json").write_text(changed)
        with pytest.raises(ValueError, match=told):
            make(images, vae, out, max_rejected=1.0)
    (out / "plan.json").write_text(text)
    listing = (out / "listing.jsonl").read_text()
    (out / "listing.jsonl").write_text(listing.replace("png", "gif"))
    with pytest.raises(ValueError, match="listing.jsonl: was altered since"):
        make(images, vae, out, max_rejected=1.0)
    (out / "listing.jsonl").write_text(listing)
    shutil.move(images, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="none of the first 4 is there on this host .first: /"):
        make(images, vae, out, max_rejected=1.0)
    shutil.move(tmp_path / "elsewhere", images)
    options = {"batch_size": None, "samples_per_shard": None, "max_rejected": 1.0, "workers": 2}
    assert make(images, vae, out, **options).manifest.num_samples == 20


def test_a_plan_put_in_another_s_place_keeps_none_of_its_work(tmp_path: Path, vae: str) -> None:
    images, whole, out = make_images(tmp_path / "images"), tmp_path / "whole", tmp_path / "out"
    break_images(images, 20)
    make(images, vae, whole, threads=1, batch_size=2, max_rejected=0.1)
    with pytest.raises(ValueError, match="1 of the 21 images"):
        make(images, vae, out, threads=1, max_rejected=0)
    assert list(out.glob("work/unit-*"))
    shutil.copy(whole / "plan.json", out)
    done = make(images, vae, out, threads=1, batch_size=2, max_rejected=0.1)
    assert done.num_encoded == 21 and data(out) == data(whole)


# Bad images


def test_too_many_bad_images_stop_and_a_higher_limit_goes_on(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images", each=12), tmp_path / "out"
    bad = break_images(images, 1, 9, 18, 19)
    (images / "list").write_text("\n".join(list_class_folders(images).paths))  # in this order
    (images / bad[1]).unlink()
    with pytest.raises(ValueError) as caught:
        make(images / "list", vae, out, max_rejected=2 / 36)
    told = str(caught.value)
    # What was looked at when the third was found: the batches are of 3 and 1.
    assert told.startswith("3 of the 19 images so far cannot be used, and max_rejected=0.0555556")
    assert f"1 as {bad[1]}: cannot be read: No such file" in told and "a higher --max-rej" in told
    assert [entry["image"] for entry in rejected(out)] == bad[:3]
    assert not (out / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("latents-*.tar")}
    assert len(before) == 4
    done = make(images / "list", vae, out, max_rejected=4 / 36)
    assert (done.manifest.num_samples, done.num_rejected, done.num_encoded) == (32, 4, 20)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    entries = rejected(out)
    assert [entry["image"] for entry in entries] == bad
    assert "cannot be read as an image" in entries[0]["reason"]
    assert entries[1]["reason"] == "cannot be read: No such file or directory"
    keys = [key for key, _ in samples(out)]
    assert keys == [f"{i:09d}" for i in range(36) if i not in (1, 9, 18, 19)]


def test_bad_images_of_all_ranks_count(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images", each=12), tmp_path / "out"
    bad = break_images(images, *range(4, 12))
    arguments = (images, vae, out, {"max_rejected": 0.1})
    told = run_ranks(2, _extract_on_a_rank, *arguments)
    assert told[0] == told[1] and "images so far cannot be used" in told[0]
    found = [entry["image"] for entry in rejected(out)]
    assert 4 <= len(found) and set(found) <= set(bad)


def test_nothing_but_bad_images_make_no_dataset(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images", classes=1, each=2)
    break_images(images, 0, 1)
    with pytest.raises(ValueError, match="2 of the 2 images so far cannot be used"):
        make(images, vae, tmp_path / "out", max_rejected=1.0)


def test_an_error_on_one_rank_stops_both_soon(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images", each=100)
    lines = [str(path) for path in images.rglob("*.*g")]
    # A disk that fails is no fault of the image: reading this file is an I/O error.
    (tmp_path / "list").write_text("\n".join([*lines, "/proc/self/mem"]))
    began = time.monotonic()
    for told in run_ranks(2, _extract_on_a_rank, tmp_path / "list", vae, tmp_path / "out", {}):
        assert "/proc/self/mem: [Errno 5]" in told and "(rank " in told
    assert time.monotonic() - began < 30
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_moments_that_are_not_finite_name_the_image(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images", classes=1)
    model = latents.load_vae(vae)
    torch.nn.init.constant_(model.quant_conv.bias, float("nan"))
    model.save_pretrained(tmp_path / "vae")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"class 0/.*: the VAE's moments are not finite"):
        make(images, str(tmp_path / "vae"), out)
    (out / "preview.png").write_bytes(b"")  # making it was what stopped; now the first unit is
    with pytest.raises(ValueError, match=r"class 0/.*: the VAE's moments are not finite"):
        make(images, str(tmp_path / "vae"), out)
    assert not list(out.glob("latents-*")) and not list(out.glob("work/unit-*"))


# Sources


def make_tars(root: Path, *, num: int = 2, each: int = 5, label: str = "cls") -> str:
    """Tars of images of two classes; the brace pattern of their names."""
    for tar in range(num):
        members = []
        for i in range(each):
            members.append((f"{i:03d}.png", png(f"rgb({i},{tar},90)")))
            if label == "cls":
                members.append((f"{i:03d}.cls", b"%d" % (i % 2)))
            if label == "json":
                members.append((f"{i:03d}.json", b'{"class": "%s"}' % (b"cat", b"dog")[i % 2]))
        write_tar(root / f"x-{tar:02d}.tar", members)
    return f"{root}/x-{{{','.join(f'{i:02d}' for i in range(num))}}}.tar"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_tars_become_shards_of_their_own(tmp_path: Path, vae: str, scheme: str) -> None:
    pattern = make_tars(tmp_path / "tars")
    done = make(scheme + pattern, vae, tmp_path / "out")
    names = [f"latents-{tar:06d}-{shard:04d}.tar" for tar in (0, 1) for shard in (0, 1)]
    assert [shard.name for shard in done.manifest.shards] == names
    assert [shard.num_samples for shard in done.manifest.shards] == [4, 1, 4, 1]
    assert done.manifest.class_names == ("0", "1")
    keys = [(f"{tar:06d}-{i:07d}", i % 2) for tar in (0, 1) for i in range(5)]
    assert samples(tmp_path / "out") == keys
    assert not (tmp_path / "out" / "work").exists()  # and what was downloaded into it
    assert len(list((tmp_path / "tars").iterdir())) == 2


def test_labels_by_name(tmp_path: Path, vae: str) -> None:
    pattern = make_tars(tmp_path / "tars", label="json")
    (tmp_path / "names").write_text("bird\ndog\ncat\n")
    done = make(pattern, vae, tmp_path / "out", classes=tmp_path / "names")
    assert done.manifest.class_names == ("bird", "dog", "cat")
    assert [label for _, label in samples(tmp_path / "out")] == [2, 1, 2, 1, 2] * 2
    with pytest.raises(ValueError, match="cannot be used.*\n.*give the class names"):
        make(pattern, vae, tmp_path / "no-names")
    images = make_images(tmp_path / "images", each=2)
    with pytest.raises(ValueError, match="classes names the labels of tars"):
        make(images, vae, tmp_path / "folders", classes=tmp_path / "names")


def test_sets_without_classes(tmp_path: Path, vae: str) -> None:
    pattern = make_tars(tmp_path / "tars", label="none")
    folder = make_images(tmp_path / "images", classes=1) / "class 0" / "deeper"
    (tmp_path / "list").write_text("\n".join(map(str, folder.iterdir())))
    places: dict[str, Path | str] = {"tars": pattern, "folder": folder, "list": tmp_path / "list"}
    for name, source in places.items():
        manifest = make(source, vae, tmp_path / f"out-{name}").manifest
        assert manifest.class_names == ("images",)
        assert {label for _, label in samples(tmp_path / f"out-{name}")} == {0}
        assert manifest.num_samples == (10 if name == "tars" else 1)


def test_bad_samples_of_tars_are_judged_by_those_seen(tmp_path: Path, vae: str) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    good = [m for i in range(8) for m in ((f"{i}.png", png()), (f"{i}.cls", b"0"))]
    write_tar(tars / "x-0.tar", good + [("8.png", png()), ("9.txt", b"")])
    write_tar(tars / "x-1.tar", [])
    write_tar(tars / "x-2.tar", good)
    whole = (tars / "x-2.tar").read_bytes()
    (tars / "x-2.tar").write_bytes(whole[: 3 * 2048])
    with pytest.raises(ValueError, match="2 of the 10 images so far cannot be used"):
        make(f"{tars}/x-*.tar", vae, out, max_rejected=0.1)
    done = make(f"{tars}/x-*.tar", vae, out, max_rejected=0.25)
    assert (done.manifest.num_samples, done.num_rejected) == (11, 3)
    assert [(Path(e["image"]).name, e["reason"][:12]) for e in rejected(out)] == [
        ("8", "has no label"),
        ("9", "has no image"),
        ("x-2.tar", "the tar is c"),
    ]


def test_bad_images_early_do_not_stop_what_is_good_in_all(tmp_path: Path, vae: str) -> None:
    good = [m for i in range(60) for m in ((f"{i:02d}.png", png()), (f"{i:02d}.cls", b"0"))]
    write_tar(tmp_path / "x-0.tar", [*good[:18], ("9.png", b"no image"), ("9.cls", b"0")])
    write_tar(tmp_path / "x-1.tar", good)
    done = make(f"{tmp_path}/x-*.tar", vae, tmp_path / "out", max_rejected=0.05)
    assert (done.manifest.num_samples, done.num_rejected) == (69, 1)
    write_tar(tmp_path / "x-0.tar", [(name, content[:30]) for name, content in good])
    with pytest.raises(ValueError, match="images so far cannot be used") as caught:
        make(f"{tmp_path}/x-*.tar", vae, tmp_path / "stopped", max_rejected=0.05)
    assert int(str(caught.value).split()[0]) < 30  # it is plain long before the first tar's end


def test_what_was_changed_or_skipped_is_counted(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images", classes=1, each=2)
    folder = images / "class 0"
    Image.new("L", (9, 30)).save(folder / "small grey.png")
    Image.new("CMYK", (16, 16)).save(folder / "print.tif")
    Image.new("RGBA", (15, 15)).save(folder / "alpha.webp")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "two.png", save_all=True, append_images=frames[1:])
    for name in ("labels.csv", ".DS_Store", "deeper/README"):
        (folder / name).write_text("not an image")
    (images / "notes.txt").write_text("not an image")
    (images / ".cache").mkdir()
    done = make(images, vae, tmp_path / "out")
    assert done.manifest.num_samples == 6
    assert done.num_enlarged == 2
    assert done.num_animated == 1
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


# The rest


def test_mistakes_are_told_before_any_work(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images", classes=1), tmp_path / "out"
    with pytest.raises(ValueError, match="image_size=15 is not a multiple of the VAE's factor 2"):
        extract(images, vae, 15, out)
    for name, value in {
        "batch_size": 0,
        "threads": 0,
        "samples_per_shard": -1,
        "workers": -1,
    }.items():
        with pytest.raises(ValueError, match=f"{name}={value} is too small; choose"):
            make(images, vae, out, **{name: value})
    with pytest.raises(ValueError, match="max_rejected=2 is no share"):
        make(images, vae, out, max_rejected=2)
    with pytest.raises(ValueError, match="vae=nothing: no such folder"):
        make(images, "nothing", out)
    with pytest.raises(ValueError, match="images=.*nowhere: no such folder or file"):
        make(tmp_path / "nowhere", vae, out)
    assert not out.exists()
    out.write_text("a file")
    with pytest.raises(ValueError, match="out: the folder cannot be made .*; choose another"):
        make(images, vae, out)


def test_an_existing_dataset_is_kept_and_leftovers_are_replaced(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images"), tmp_path / "out"
    (out / "work").mkdir(parents=True)
    for name in ("latents-000000.tar", "latents-000002.tar.tmp", "latents-000099.tar"):
        (out / name).write_bytes(b"of a killed run")
    for name in ("unit-000000.json", "tar-000001.tar", "unit-000001.json.tmp"):
        (out / "work" / name).write_bytes(b"of a killed run")
    (out / "notes.txt").write_text("of the user")
    (out / "work" / "notes.txt").write_text("of the user")
    make(images, vae, out)
    before = contents(out)
    shards = [f"latents-{i:06d}.tar" for i in range(6)]
    others = ["listing.jsonl", "manifest.json", "notes.txt", "plan.json", "preview.png"]
    assert sorted(before) == shards + others
    assert list(contents(out / "work")) == ["notes.txt"]
    # Again, it is finished; with other settings it is another data set.
    assert extract(images, vae, 16, out) is None
    with pytest.raises(ValueError, match="batch_size=2, but .* was begun with batch_size=3"):
        extract(images, vae, 16, out, batch_size=2)
    assert contents(out) == before
    shutil.move(out / shards[2], tmp_path / "away")
    with pytest.raises(ValueError, match=f"{shards[2]} is missing.*remove .*manifest.json and run"):
        extract(images, vae, 16, out)
    (out / "manifest.json").unlink()
    make(images, vae, out)
    assert contents(out) == before
    (out / "plan.json").unlink()  # a data set of somebody else
    with pytest.raises(ValueError, match="already holds a dataset; remove it or choose another"):
        extract(images, vae, 16, out)


def test_what_cannot_be_meant_is_refused_before_any_work(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images", classes=1)
    (tmp_path / "linked").mkdir()
    (images / "class 1").symlink_to(tmp_path / "linked")
    for where, told in (
        ("s3://bucket/latents", "is a URL; give a folder, and upload it"),
        (str(images / "latents"), "lies in images=.*choose a folder beside it"),
        (str(tmp_path / "linked" / "latents"), "lies in images=.*choose a folder beside it"),
        (" ", "out is empty"),
    ):
        with pytest.raises(ValueError, match=told):
            extract(images, vae, 16, where)
    with pytest.raises(ValueError, match="images is empty"):
        extract("", vae, 16, tmp_path / "out")
    with pytest.raises(ValueError, match="image_size=-16 is not positive; choose a multiple of 2"):
        extract(images, vae, -16, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "linked"]
    assert not (images / "latents").exists() and not list((tmp_path / "linked").iterdir())


def test_a_pipe_among_the_images_is_rejected(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images", classes=1)
    os.mkfifo(images / "class 0" / "pipe.png")
    done = make(images, vae, tmp_path / "out", max_rejected=0.5)
    assert done.num_rejected == 1 and "pipe.png: cannot be read: not a regular" in done.rejected


def test_classes_without_an_image_are_told(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images", classes=2)
    for path in (images / "class 1").rglob("*.*"):
        path.write_bytes(b"")
    done = make(images, vae, tmp_path / "out", max_rejected=0.9)
    assert done.empty_classes == ["class 1"]


def test_a_damaged_record_has_its_unit_made_again(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images")
    make(images, vae, tmp_path / "whole")
    out = begin(tmp_path / "whole", tmp_path / "out")
    last = Path(list_class_folders(images).paths[-1])
    broken = images / last
    good = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be used"):
        make(images, vae, out)
    records = sorted((out / "work").glob("unit-*.json"))
    assert len(records) > 2
    records[0].write_bytes(records[0].read_bytes()[:10])
    broken.write_bytes(good)
    for path in records[-1:]:  # that of the broken image
        path.unlink()
    make(images, vae, out)
    assert data(out) == data(tmp_path / "whole")


@pytest.mark.parametrize(("precision", "epsilon"), [("bf16", 2**-7), ("fp16", 2**-9)])
def test_precisions_share_the_hash_and_come_close(
    tmp_path: Path, vae: str, precision: str, epsilon: float
) -> None:
    images = make_images(tmp_path / "images", each=2)
    full = make(images, vae, tmp_path / "fp32").manifest
    half = make(images, vae, tmp_path / precision, precision=precision).manifest
    assert half.vae == full.vae and half.fingerprint != full.fingerprint
    assert half.statistics and full.statistics
    np.testing.assert_allclose(half.statistics.std, full.statistics.std, rtol=4 * epsilon)


def test_the_batch_size_found_fits_the_shards(tmp_path: Path, vae: str) -> None:
    assert find_batch_size(latents.load_vae(vae), 16, most=5) in (1, 2, 4)
    images, out = make_images(tmp_path / "images", each=2), tmp_path / "out"
    make(images, vae, out, batch_size=None)
    plan = Plan.load(out)
    assert plan is not None and plan.batch_size in (1, 2, 4)


def run_tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_tool_ends_with_a_line_on_ctrl_c(tmp_path: Path, vae: str) -> None:
    images, out = make_images(tmp_path / "images", each=200), tmp_path / "out"
    command: list[str | Path] = [
        sys.executable,
        TOOL,
        "--images",
        images,
        "--vae",
        vae,
        "--image-size",
        "16",
    ]
    command += ["--out", out, "--samples-per-shard", "4", "--batch-size", "2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    ) as process:
        while process.poll() is None and not list(out.glob("work/unit-*.json")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its workers, too
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    # A worker that was handing over a batch may say, in a thread of Python's, that nobody came.
    assert "interrupted; the same command goes on\n" in told and "KeyboardInterrupt" not in told


def test_the_tool_from_any_folder(tmp_path: Path, vae: str) -> None:
    images = make_images(tmp_path / "images")
    (bad,) = break_images(images, 3)
    options = ("--images", "images", "--image-size", 16, "--vae", vae, "--out", "out")
    done = run_tool(*options, "--samples-per-shard", 8, "--json", cwd=tmp_path)
    assert done.returncode == 2
    first, *lines = done.stderr.splitlines()
    assert first.startswith("error: 1 of the ") and any(bad in line for line in lines)
    done = run_tool(*options, "--max-rejected", 0.05, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    manifest = Manifest.load(tmp_path / "out")
    assert (facts["num_samples"], facts["num_shards"], facts["num_classes"]) == (20, 3, 3)
    assert facts["num_rejected"] == 1 and facts["fingerprint"] == manifest.fingerprint
    assert "20 images in 3 classes, latents 16x8x8" in done.stdout
    assert "1 images were rejected, see out/rejected.jsonl" in done.stdout
    assert "latents' std by channel: " in done.stdout and "far from 1" in done.stdout
