"""`tools/sample.py`: the same images on any number of ranks, in a file that is there or is not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import signal
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_ds import draws, export, latents, sampling
from dit_ds.models import DiT
from dit_ds.settings import Objective
from tests import runs
from tests.conftest import FP32, REPO, kill_ranks, run_ranks

SIZE = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for random weights of 30 classes, and a VAE whose latents are as large as images.

    A pass of the model takes little of the time, so that there can be many images.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).save_pretrained(folder / "vae")
    sizes = export.Sizes(
        input_size=SIZE, patch_size=8, in_channels=4, hidden_size=16, depth=1, num_heads=2,
        num_classes=30, mlp_ratio=2.0, learn_sigma=True,
    )  # fmt: skip
    model = DiT(**sizes.model_dump())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    about = export.Description(
        model=sizes, latent_shape=(4, SIZE, SIZE), scaling_factor=0.5, shift_factor=0.0,
        image_size=SIZE, class_names=[str(i) for i in range(30)], objective=Objective(), step=7,
        vae=str(folder / "vae"), vae_sha256=latents.vae_hash(latents.load_vae(folder / "vae")),
        dataset="tests", images_seen=84,
    )  # fmt: skip
    export.save(export.Weights(model.state_dict(), about), folder / "ema.safetensors")
    return ["--weights", str(folder / "ema.safetensors"), "--steps", "2"]


def tool(name: str, *arguments: str) -> int:
    """`tools/NAME.py` in a forked rank; the most memory it took, in bytes."""
    spec = importlib.util.spec_from_file_location(name, REPO / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(list(arguments))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def told_by(*arguments: str) -> str:
    """What a rank that succeeds prints."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as output:
        tool("sample", *arguments)
    return output.getvalue()


def outputs(folder: Path, name: str = "x") -> list[str]:
    return ["--out", str(folder / f"{name}.png"), "--npz", str(folder / f"{name}.npz")]


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        assert sorted(data) == ["arr_0", "labels"]
        return data["arr_0"], data["labels"]


# Batches of 4: two full ones and a rest; or a full one and a rest, fewer than there are ranks.
@pytest.mark.parametrize("choice", ["--classes=0-1,29 --per-class=3", "--num-images=6"])
def test_any_number_of_ranks_writes_the_same_bytes(
    source: list[str], tmp_path: Path, choice: str
) -> None:
    for world in (1, 2, 3):
        arguments = [*source, *choice.split(), "--batch-size", "4"]
        run_ranks(world, tool, "sample", *arguments, *outputs(tmp_path, str(world)))
    for suffix in ("png", "npz"):
        one = (tmp_path / f"1.{suffix}").read_bytes()
        assert all((tmp_path / f"{world}.{suffix}").read_bytes() == one for world in (2, 3))
    images, labels = load(tmp_path / "1.npz")
    assert images.dtype == np.uint8 and images.shape == (len(labels), SIZE, SIZE, 3)
    assert labels.dtype == np.int64
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    if "29" in choice:
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 29, 29, 29]


@pytest.mark.parametrize("sampler", ["euler", "sde", "dpm++"])
def test_flows_are_sampled_alike_on_any_number_of_ranks(
    source: list[str], tmp_path: Path, sampler: str
) -> None:
    trained = export.load(Path(source[1]))
    sizes = trained.about.model.model_copy(update={"learn_sigma": False})
    torch.manual_seed(0)
    model = DiT(**sizes.model_dump())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    about = trained.about.model_copy(update={"model": sizes, "objective": Objective(name="flow")})
    export.save(export.Weights(model.state_dict(), about), tmp_path / "flow.safetensors")
    options = [] if sampler == "euler" else ["--sampler", sampler]  # it is the default
    files = []
    for world in (1, 2):
        arguments = ["--weights", str(tmp_path / "flow.safetensors"), "--steps", "3", *options]
        arguments += ["--num-images", "6", "--batch-size", "4", *outputs(tmp_path)]
        assert f"{sampler} 3 steps" in run_ranks(world, told_by, *arguments)[0]
        files.append((tmp_path / "x.npz").read_bytes())
    assert files[0] == files[1]


def test_batch_size_changes_no_more_than_rounding(source: list[str], tmp_path: Path) -> None:
    for batch in ("2", "9"):
        arguments = [*source, "--num-images", "9", "--batch-size", batch]
        run_ranks(1, tool, "sample", *arguments, *outputs(tmp_path, batch))
    one, other = load(tmp_path / "2.npz"), load(tmp_path / "9.npz")
    assert np.abs(one[0].astype(int) - other[0].astype(int)).max() <= 1
    assert np.array_equal(one[1], other[1])


def test_runs_and_their_exports_give_the_same(
    tiny: dict[str, Any], source: list[str], tmp_path: Path
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", FP32)
    run_ranks(1, runs.train, *runs.arguments(tiny, ds, "train.steps=1"))
    vae = factor_8(tmp_path)
    weights = tmp_path / "ema.safetensors"
    run_ranks(1, tool, "export", "--run", str(tiny["run"]), "--out", str(weights))
    for name, where in (("run", tiny["run"]), ("weights", weights)):
        arguments = [f"--{name}", str(where), "--vae", str(vae), "--steps", "2"]
        (told,) = run_ranks(1, told_by, *arguments, "--json", *outputs(tmp_path, name))
        facts = json.loads(told.splitlines()[-1])
        assert facts["images"] == 24 and facts["step"] == 1  # 8 of each of the 3 classes
        assert "WARNING: this is not the VAE that the training data was made with" in told
    assert (tmp_path / "run.npz").read_bytes() == (tmp_path / "weights.npz").read_bytes()


def factor_8(folder: Path) -> Path:
    """A VAE for the latents of the `tiny` fixture."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder / "vae")
    return folder / "vae"


def test_random_classes_belong_to_the_image() -> None:
    labels = sampling.random_labels([3, 5, 8], 30_000, seed=0)
    assert torch.equal(labels[:100], sampling.random_labels([3, 5, 8], 100, seed=0))
    assert not torch.equal(labels[:100], sampling.random_labels([3, 5, 8], 100, seed=1))
    counts = [(labels == c).sum().item() for c in (3, 5, 8)]
    assert sum(counts) == 30_000
    assert all(abs(count - 10_000) < 5 * 82 for count in counts)  # standard deviation 82
    assert draws.bits(0, "sample_label", 0, np.arange(1))[0] == 12133134738372665739  # for ever


def test_the_evaluator_of_the_field_can_stream_it(source: list[str], tmp_path: Path) -> None:
    run_ranks(1, tool, "sample", *source, "--num-images", "5", *outputs(tmp_path))
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None
        with archive.open("arr_0.npy") as member:  # as ADM's evaluator opens it
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            assert (shape, fortran, dtype) == ((5, SIZE, SIZE, 3), False, np.uint8)
            rest = np.frombuffer(member.read(), dtype)
    assert np.array_equal(rest.reshape(shape), load(tmp_path / "x.npz")[0])


def test_the_grid_holds_the_first_of_each_class() -> None:
    labels = torch.tensor([7] * 20 + [2] + [7] + [2] + list(range(100, 140)))
    images = np.zeros((len(labels), 64, 64, 3), np.uint8)
    images += np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    grid = sampling.Grid(labels)
    for start in range(0, len(labels), 7):
        grid.add(images[start : start + 7])
    sheet = np.asarray(grid.sheet())[2::66, 2::66, 0]
    assert sheet.shape == (16, 16) and grid.num_images == 16 + 2 + 14
    assert sheet[0].tolist() == list(range(16))  # of class 7
    assert sheet[1].tolist() == [20, 22] + [255] * 14  # of class 2
    assert sheet[2:, 0].tolist() == list(range(23, 37))


def test_memory_does_not_grow_with_the_number_of_images(source: list[str], tmp_path: Path) -> None:
    peaks = []
    for num in (1_000, 10_000):
        arguments = [*source, "--steps", "1", "--num-images", str(num), "--batch-size", "50"]
        peaks.append(run_ranks(2, tool, "sample", *arguments, *outputs(tmp_path, str(num))))
    more = [many - few for few, many in zip(*peaks, strict=True)]
    assert load(tmp_path / "10000.npz")[0].nbytes > 30_000_000
    assert max(more) < 12_000_000, more  # 1 to 6 million of them by chance


def test_a_disk_too_small_is_told_before_the_first_image(source: list[str], tmp_path: Path) -> None:
    many = [*source, "--num-images", str(10**12), *outputs(tmp_path / "new")]
    told = run_ranks(2, tool, "sample", *many, expect=2)
    assert re.search(r"x\.npz: 10+ images of 32 pixels take \d+\.\d+ GB, and .* has", told[0])
    assert told[1] == "" and not list((tmp_path / "new").iterdir())


def full_after(num_bytes: int, *arguments: str) -> None:
    """The tool on a disk on which no file can grow further."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    tool("sample", *arguments)


@pytest.mark.parametrize("num_bytes", [0, 40_000, 20 * SIZE * SIZE * 3 + 500])
def test_a_disk_that_fills_up_leaves_what_was_there(
    source: list[str], tmp_path: Path, num_bytes: int
) -> None:
    (tmp_path / "x.npz").write_text("before")
    arguments = [*source, "--num-images", "20", "--batch-size", "4", *outputs(tmp_path)]
    told = run_ranks(2, full_after, num_bytes, *arguments, expect=2)
    assert "x.npz cannot be written (File too large); what was there is untouched" in told[0]
    assert "Traceback" not in told[0] and told[1] == ""
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    assert (tmp_path / "x.npz").read_text() == "before"


def killed_at(num_bytes: int, file: str, *arguments: str) -> None:
    """The tool, whose rank 0 is killed when a file has grown so large."""

    def watch() -> None:
        while not os.path.exists(file) or os.path.getsize(file) < num_bytes:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "0":
        threading.Thread(target=watch, daemon=True).start()
    tool("sample", *arguments)


def test_a_kill_leaves_no_half_and_hinders_no_other_start(
    source: list[str], tmp_path: Path
) -> None:
    arguments = [*source, "--num-images", "800", "--batch-size", "100", *outputs(tmp_path)]
    written = str(tmp_path / "x.npz.tmp")
    assert -signal.SIGKILL in kill_ranks(2, killed_at, 1_000_000, written, *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz.tmp"]
    run_ranks(1, tool, "sample", *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz", "x.png"]
    assert len(load(tmp_path / "x.npz")[0]) == 800


def test_deepspeed_takes_no_option_for_its_own() -> None:
    from deepspeed.launcher.runner import parse_args

    tool = (REPO / "tools" / "sample.py").read_text()
    options = re.findall(r'"(--[a-z-]+)"', tool)
    assert "--num-images" in options
    for option in options:  # it knows its own by their beginnings, behind the script too
        assert parse_args(["tools/sample.py", option, "1"]).user_args == [option, "1"]


def test_idle_ranks_are_told_of(source: list[str], tmp_path: Path) -> None:
    told = run_ranks(2, told_by, *source, "--num-images", "1", *outputs(tmp_path))
    assert "only 1 of 2 ranks have images to make" in told[0] and "--batch-size 1" in told[0]
    assert told[1] == "" and len(load(tmp_path / "x.npz")[0]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--classes", "30"], "--classes 30: the model knows classes 0-29"),
        (["--classes", "0-99999999999999"], "the model knows classes 0-29"),
        (["--classes", "a"], "expected numbers and ranges"),
        (["--classes", "9-2,3"], "--classes 9-2,3: 9-2 is empty; write 2-9"),
        (["--steps", "0"], "steps=0"),
        (["--sampler", "heun"], "sampler=heun has no meaning for a model of objective.name=ddpm"),
        (["--eta", "0.5"], "choose sampler=ddim"),
        (["--per-class", "0"], "--per-class 0"),
        (["--num-images", "0", "--npz", "x.npz"], "--num-images 0"),
        (["--num-images", "9"], "give --npz FILE for all of them"),
        (["--per-class", "17"], "at most 16 classes and 16 images of each; give --npz"),
        (["--classes", "0-16"], "give --npz FILE for all of them"),
        (["--vae", "/nowhere/vae"], "/nowhere/vae"),
        (["--guidance-interval", "x"], "expected LOW,HIGH"),
        (["--out", "grid"], "--out grid: name a picture"),
        (["--npz", "images.png"], "--npz images.png: name a file that ends in .npz"),
        (["--out", "folder.png"], "folder.png is a folder; name a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(
    source: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit, match="2"):
        tool("sample", *source, *arguments)
    told = capsys.readouterr().err
    assert sentence in told and told.startswith("error: ") and told.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def different_seeds(*arguments: str) -> None:
    tool("sample", *arguments, "--seed", os.environ["RANK"])


def test_ranks_that_were_asked_for_different_things_are_told(
    source: list[str], tmp_path: Path
) -> None:
    told = run_ranks(2, different_seeds, *source, *outputs(tmp_path), expect=2)
    assert "the ranks differ in the weights or in what to make of them" in told[0]
    assert not list(tmp_path.iterdir())


def test_the_picture_can_be_of_other_kinds(source: list[str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "grid.webp"
    run_ranks(1, tool, "sample", *source, "--classes", "4,2", "--per-class", "3", "--out", str(out))
    with Image.open(out) as picture:
        assert picture.format == "WEBP" and picture.size == (3 * 66 + 2, 2 * 66 + 2)
