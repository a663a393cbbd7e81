"""A run as its user sees it: what it writes, what it refuses, how it ends when asked to."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dit_ds import config, export, latents, optim, sampling, zero_config
from dit_ds.manifest import Manifest
from dit_ds.settings import Optimizer
from tests import runs
from tests.conftest import REPO, make_latents, run_ranks

FP32 = REPO / "ds_configs" / "zero2_fp32.json"


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VAE with random weights: 4 channels, factor 8."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder)
    return folder


def test_a_run_directory_has_what_it_promises(
    tiny: dict[str, Any], vae: Path, tmp_path: Path
) -> None:
    previews = ["preview.every=3", f"preview.vae={vae}", "preview.steps=2", "preview.per_class=2"]
    told = run_ranks(2, told_by, *runs.arguments(tiny, FP32, *previews))
    assert "DiT with 50,944 parameters, fp32, ZeRO stage 2" in told[0]
    assert "2 ranks x 2 micro-steps x 3 samples for a global batch of 12" in told[0]
    assert "step 6/6  loss" in told[0] and "done at step 6" in told[0]
    assert told[1] == ""  # rank 0 speaks for all

    run = tiny["run"]
    cfg = config.load(str(run / "config.yaml"))
    assert cfg == config.load(str(tiny["recipe"]), previews)
    assert json.loads((run / "ds_config.json").read_text()) == zero_config.load(FP32)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and len(environment["ranks"]) == 2

    lines = runs.metrics(run)
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    assert [m["images"] for m in lines] == [12, 24, 36, 48, 60, 72]
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    wanted = {"loss", "mse", "vb", "gradient_norm", "lr", "images_per_second", "data_wait_share"}
    assert wanted | {"memory_gib", "loss_by_time/0.00-0.25"} <= set(board.Tags()["scalars"])
    for name in wanted:
        values = [event.value for event in board.Scalars(name)]
        assert values == pytest.approx([m[name] for m in lines], rel=1e-6), name
    for m, expected in zip(lines, (5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3), strict=True):
        assert m["lr"] == pytest.approx(expected)
        assert m["loss"] == pytest.approx(m["mse"] + m["vb"], rel=1e-6)
        assert 0 <= m["data_wait_share"] <= 1 and m["gradient_norm"] > 0
        assert m["images_per_second"] > 0 and 0.05 < m["memory_gib"] < 24

    assert [event.step for event in board.Images("samples")] == [3, 6]
    sheet = Image.open(run / "samples" / "step-00000006.png")
    assert sheet.size[1] > sheet.size[0]  # three classes high, two images wide


FLOW = ("objective.name=flow", "model.learn_sigma=false")


@pytest.mark.parametrize(
    ("stage", "world", "objective", "sampler"),
    [(0, 2, (), "ddim"), (2, 1, FLOW, "euler"), (3, 2, (), "ddim")],
)
def test_previews_show_the_average_and_leave_the_weights_alone(
    tiny: dict[str, Any],
    vae: Path,
    tmp_path: Path,
    stage: int,
    world: int,
    objective: tuple[str, ...],
    sampler: Any,
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
    run_ranks(world, runs.train, *runs.arguments(tiny, ds, *objective))
    plain = runs.state_of(tiny["run"], 6)
    tiny["run"] = tmp_path / "with-previews"
    previews = ["preview.every=2", f"preview.vae={vae}", "preview.steps=2", "preview.per_class=1"]
    run_ranks(world, runs.train, *runs.arguments(tiny, ds, *previews, *objective))
    runs.assert_same_bits(plain, runs.state_of(tiny["run"], 6))
    # The same picture as from the exported weights, to a rounding of grey.
    sheet = tmp_path / "sheet.png"
    manifest = Manifest.load(tmp_path / "latents")
    weights = export.from_run(tiny["run"])
    from dit_ds.samplers import SamplerSettings, sample

    settings = SamplerSettings(sampler=sampler, steps=2, cfg_scale=4.0, seed=0)
    z = sample(
        weights.build(),
        sampling.objective_of(weights.about),
        settings,
        classes=torch.arange(3),
        latent_shape=manifest.latent_shape,
    )
    space = latents.LatentSpace(manifest.scaling_factor)
    images = latents.decode(latents.load_vae(str(vae)), z, space)
    latents.image_grid(images, rows=3, columns=1).save(sheet)
    shown = np.asarray(Image.open(tiny["run"] / "samples" / "step-00000006.png"), np.int16)
    assert np.abs(shown - np.asarray(Image.open(sheet), np.int16)).max() <= 1


def told_by(*arguments: str) -> str:
    """Train and return what was printed on the way."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        runs.train(*arguments)
    return out.getvalue()


def fail_to_preview(*arguments: str) -> str:
    """Train where pictures fail while a checkpoint is being written."""
    import contextlib
    import io

    def failing(*arguments: Any) -> None:
        raise ValueError("no picture today")

    latents.decode = failing  # type: ignore[assignment]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        runs.train(*arguments)
    return out.getvalue()


def test_a_picture_that_fails_ends_nothing(tiny: dict[str, Any], vae: Path) -> None:
    pictures = ["preview.every=4", f"preview.vae={vae}", "preview.steps=2", "preview.per_class=1"]
    told = run_ranks(2, fail_to_preview, *runs.arguments(tiny, FP32, *pictures))
    assert "no picture today (rank 0 on " in told[0] and "goes on without these samples" in told[0]
    assert "done at step 6" in told[0]


# ------------------------------------------------------------------------------ asked to end


def train_and_signal(number: int, at_step: int, rank: int, *arguments: str) -> None:
    """Train; one rank signals itself once it has logged a step."""
    from dit_ds import distributed, monitor

    log = monitor.Monitor.log

    def log_and_signal(self: Any, *rest: Any, step: int, **named: Any) -> None:
        log(self, *rest, step=step, **named)
        if step == at_step and distributed.rank() == rank:
            os.kill(os.getpid(), number)
            time.sleep(0)  # lets the handler take its note

    monitor.Monitor.log = log_and_signal  # type: ignore[method-assign]
    runs.train(*arguments)


@pytest.mark.parametrize(("number", "workers"), [("TERM", 0), ("TERM", 2), ("INT", 1)])
def test_a_signal_to_one_rank_saves_all_and_exits_0(
    tiny: dict[str, Any], number: str, workers: int
) -> None:
    arguments = runs.arguments(tiny, FP32, f"data.workers={workers}")
    run_ranks(2, train_and_signal, signal.Signals[f"SIG{number}"], 4, 1, *arguments)
    assert len(runs.metrics(tiny["run"])) == 4
    assert (tiny["run"] / "checkpoints/latest").read_text() == "step-00000004\n"
    # The same command goes on, and nothing is lost or repeated.
    run_ranks(2, runs.train, *arguments)
    assert [m["step"] for m in runs.metrics(tiny["run"])] == [1, 2, 3, 4, 5, 6]


def test_sigusr1_saves_and_goes_on(tiny: dict[str, Any]) -> None:
    run_ranks(2, train_and_signal, signal.SIGUSR1, 4, 0, *runs.arguments(tiny, FP32))
    names = sorted(p.name for p in (tiny["run"] / "checkpoints").glob("step-*"))
    assert names == ["step-00000003", "step-00000004", "step-00000006"]


def test_stop_after_hours_saves_and_ends(tiny: dict[str, Any]) -> None:
    run_ranks(2, runs.train, *runs.arguments(tiny, FP32, "train.stop_after_hours=1e-6"))
    assert (tiny["run"] / "checkpoints/latest").read_text() == "step-00000001\n"


def test_a_finished_run_says_so_and_does_nothing(tiny: dict[str, Any]) -> None:
    run_ranks(1, runs.train, *runs.arguments(tiny, FP32))
    before = (tiny["run"] / "metrics.jsonl").read_bytes()
    (told,) = run_ranks(1, told_by, *runs.arguments(tiny, FP32))
    assert "is finished at step 6; for more, set train.steps above that" in told
    assert (tiny["run"] / "metrics.jsonl").read_bytes() == before


def test_lines_of_a_killed_run_are_dropped_on_resume(tiny: dict[str, Any]) -> None:
    run_ranks(1, runs.train, *runs.arguments(tiny, FP32, "train.steps=3"))
    with open(tiny["run"] / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')  # and a kill here
    run_ranks(1, runs.train, *runs.arguments(tiny, FP32))
    lines = runs.metrics(tiny["run"])
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6] and lines[3]["loss"] < 9


# ------------------------------------------------------------------------------ refused


def refused(tiny: dict[str, Any], *overrides: str, ds: Path = FP32, world: int = 2) -> str:
    """What is printed when all ranks exit with 2; once, and without a traceback."""
    told = run_ranks(world, runs.train, *runs.arguments(tiny, ds, *overrides), expect=2)
    assert "Traceback" not in "".join(told) and not "".join(told[1:])
    assert told[0].count("error: ") == 1
    return told[0]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.depht=3", "did you mean model.depth?"),
        ("data.path=''", "data.path is not set"),
        ("data.path=nowhere", "make the dataset with tools/precompute_latents.py"),
        ("train.expect_ranks=4", "train.expect_ranks=4, but 2 ranks started"),
        ("model.num_heads=5", "num_heads=5"),
        ("model.patch_size=3", "patch_size=3"),
        ("preview.every=1", "preview.vae=none"),
    ],
)
def test_a_mistake_is_told_once_before_the_first_step(
    tiny: dict[str, Any], override: str, sentence: str
) -> None:
    assert sentence in refused(tiny, override)
    assert not tiny["run"].exists()


def test_an_unknown_model_is_told_the_nearest(tiny: dict[str, Any]) -> None:
    sizes = [f"model.{k}=null" for k in ("patch_size", "hidden_size", "depth", "num_heads")]
    assert "did you mean DiT-B/2?" in refused(tiny, "model.name=DiTB/2", *sizes)


def test_a_damaged_data_set_is_named(tiny: dict[str, Any], tmp_path: Path) -> None:
    shard = tmp_path / "latents" / "shard-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    assert "shard-000001.tar" in refused(tiny)
    shard.unlink()
    assert "shard-000001.tar" in refused(tiny)
    altered = bytearray(data)
    altered[3000] ^= 4
    shard.write_bytes(altered)
    told = refused(tiny, "data.workers=1")
    assert "shard-000001.tar" in told and "sha256" in told


def test_another_configuration_data_set_or_precision_is_refused(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    run_ranks(2, runs.train, *runs.arguments(tiny, FP32, "train.steps=3"))
    assert "optimizer.lr=0.5 (was 0.001)" in refused(tiny, "optimizer.lr=0.5")
    bf16 = REPO / "ds_configs" / "zero2.json"
    assert "trained in fp32, --deepspeed_config asks for bf16" in refused(tiny, ds=bf16)
    make_latents(tmp_path / "others", counts=(30, 30))
    others = f"data.path={tmp_path / 'others'}"
    assert "is not the data set that this run was trained on" in refused(tiny, others)
    run_ranks(2, runs.train, *runs.arguments(tiny, FP32, others, "data.allow_change=true"))
    assert len(runs.metrics(tiny["run"])) == 6


def test_deepspeed_keys_with_a_typo_are_refused_inside_sections_too(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2, "overlap": 1}})
    assert "overlap" in refused(tiny, ds=ds)


# ------------------------------------------------------------------------------ small parts


def test_learning_rate_warms_up_and_follows_the_cosine() -> None:
    settings = Optimizer(lr=2.0, warmup_steps=4, schedule="cosine")
    rates = [optim.learning_rate(settings, step, num_steps=14) for step in range(15)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0
    assert rates[9] == pytest.approx(1.0) and rates[14] == pytest.approx(0.0)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    flat = Optimizer(lr=2.0)
    assert {optim.learning_rate(flat, step, num_steps=3) for step in range(3)} == {2.0}


@pytest.mark.parametrize("stage", [1, 3])
def test_export_is_the_average_whatever_the_stage(
    tiny: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
    run_ranks(2, runs.train, *runs.arguments(tiny, ds))
    weights = export.from_run(tiny["run"])
    state = runs.state_of(tiny["run"], 6)
    for name in weights.state:
        source = f"ema/{name}" if f"ema/{name}" in state else f"module/{name}"
        assert torch.equal(weights.state[name], state[source])
    export.save(weights, tmp_path / "out" / "ema.safetensors")
    again = export.load(tmp_path / "out" / "ema.safetensors")
    assert again.about == weights.about and weights.about.images_seen == 72
    runs.assert_same_bits(again.state, weights.state)
    made = [tmp_path / "out" / "ema.safetensors", *tiny["run"].glob("checkpoints/*/*.safetensors")]
    usual = (tmp_path / "tiny.yaml").stat().st_mode  # others may read them as any file
    assert {path.stat().st_mode for path in made} == {usual}
    model = again.build()
    assert {k for k, _ in model.named_parameters()} | {"pos_embed"} == set(weights.state)


def test_exports_that_cannot_be_read_are_named(tiny: dict[str, Any], tmp_path: Path) -> None:
    for make, sentence in (
        (lambda: export.from_run(tmp_path / "no"), "no such folder"),
        (lambda: export.from_run(tmp_path), "no checkpoint yet"),
        (lambda: export.load(tmp_path / "x.pt"), "weights are a FILE.safetensors here"),
        (lambda: export.load(tmp_path / "x.safetensors"), r"cannot read .*x\.safetensors"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"its description x\.json is not beside it"):
        export.load(tmp_path / "x.safetensors")
    (tmp_path / "x.json").write_text(json.dumps({"hello": 1}))
    with pytest.raises(ValueError, match="not a description of weights"):
        export.load(tmp_path / "x.safetensors")
