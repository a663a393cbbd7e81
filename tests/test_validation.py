"""The validation loss is a property of weights and data, not of who computes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dit_ds import distributed
from dit_ds.manifest import Folder, Manifest
from dit_ds.samples import Samples
from tests.conftest import FP32, make_latents, run_ranks
from tests.runs import arguments, assert_same_bits, losses, metrics, state_of, train, write_json

NAMES = {
    f"{weights}/{k}" for weights in ("validation", "validation_ema") for k in ("loss", "mse", "vb")
}


@pytest.fixture
def other(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """A second data set of the same kind, of 23 samples, and the recipe that names it."""
    folder = tmp_path / "validation"
    make_latents(folder, counts=(9, 14), first=1000)
    return folder


def values_of(tiny: dict[str, Any], ds: str, other: str, micro: int) -> dict[str, float]:
    """Evaluate a run's newest checkpoint in this world."""
    from dit_ds import config, restore, rundir, train, zero_config
    from dit_ds.ddpm import DDPM
    from dit_ds.latents import LatentSpace
    from dit_ds.loader import Split
    from dit_ds.validation import Validation

    distributed.init()
    overrides = [f"validation.path={other}", f"train.micro_batch_size={micro}"]
    cfg, tree = config.load(str(tiny["recipe"]), overrides), zero_config.load(Path(ds))
    manifest = Manifest.load(cfg.data.path)
    about = rundir.describe(cfg, tree, manifest)
    split = Split.of(global_batch=12, world_size=distributed.world_size(), micro_batch=micro)
    engine = train.build_engine(cfg, tree, split, about["weights"]["model"])
    found = restore.newest(Path(tiny["run"]) / "checkpoints")
    assert found is not None
    restore.load(engine, found)
    objective = DDPM(manifest.num_classes)
    space = LatentSpace(manifest.scaling_factor, manifest.shift_factor)

    def loss(model: Any, micro: Any) -> dict[str, torch.Tensor]:
        return objective.loss(model, space.sample(micro.moments, micro.posterior), micro)

    validation = Validation(cfg, Folder(other), manifest, DDPM.losses)
    values = validation.losses(engine, loss)
    assert validation.losses(engine, loss) == values
    distributed.shutdown()
    return values


def test_any_number_of_ranks_finds_the_same_figure(
    tiny: dict[str, Any], other: Path, tmp_path: Path
) -> None:
    stage2 = write_json(tmp_path / "stage2.json", FP32)
    stage3 = write_json(tmp_path / "stage3.json", {"zero_optimization": {"stage": 3}})
    run_ranks(1, train, *arguments(tiny, stage2, "optimizer.lr=0.05"))
    (alone,) = run_ranks(1, values_of, tiny, str(stage2), str(other), 4)
    assert alone.keys() == NAMES
    assert alone["validation/loss"] != alone["validation_ema/loss"]
    for world, ds in ((2, stage2), (3, stage2), (2, stage3), (4, stage3)):
        assert run_ranks(world, values_of, tiny, str(ds), str(other), 4) == [alone] * world
    # Another batch rounds differently, in the last bits of float32.
    (larger,) = run_ranks(1, values_of, tiny, str(stage2), str(other), 10)
    assert larger == pytest.approx(alone, rel=1e-5)


def test_training_is_not_disturbed_and_the_curve_is_written(
    tiny: dict[str, Any], other: Path, tmp_path: Path
) -> None:
    ds = write_json(tmp_path / "ds.json", FP32)
    run_ranks(2, train, *arguments(tiny, ds))
    undisturbed, expected = state_of(tiny["run"], 6), losses(tiny["run"])
    shutil.rmtree(tiny["run"])
    run_ranks(2, train, *arguments(tiny, ds, f"validation.path={other}", "validation.every=4"))
    assert_same_bits(state_of(tiny["run"], 6), undisturbed)
    assert losses(tiny["run"]) == expected
    lines = [m for m in metrics(tiny["run"]) if "validation/loss" in m]
    assert [m["step"] for m in lines] == [4, 6]  # at intervals, and at the end
    assert all(m.keys() == NAMES | {"step", "images"} for m in lines)
    board = EventAccumulator(str(tiny["run"] / "tensorboard")).Reload()
    drawn = [event.value for event in board.Scalars("validation_ema/loss")]
    assert drawn == pytest.approx([m["validation_ema/loss"] for m in lines])
    # A resume may watch more often, or something else.
    more = arguments(tiny, ds, f"validation.path={other}", "validation.every=1", "train.steps=8")
    run_ranks(2, train, *more)
    steps = [m["step"] for m in metrics(tiny["run"]) if "validation/loss" in m]
    assert steps == [4, 6, 7, 8]


def test_a_damaged_validation_shard_is_told_and_training_goes_on(
    tiny: dict[str, Any], other: Path, tmp_path: Path
) -> None:
    path = other / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    ds = write_json(tmp_path / "ds.json", FP32)
    args = arguments(tiny, ds, f"validation.path={other}", "validation.every=2")
    outputs = run_ranks(2, train_and_tell, *args)
    assert "WARNING: " in outputs[0] and "shard-000001.tar: its content was altered" in outputs[0]
    assert len(losses(tiny["run"])) == 6


def train_and_tell(*args: str) -> str:
    """What a training prints."""
    import contextlib
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        train(*args)
    return output.getvalue()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scaling_factor": 0.7}, "has another scaling_factor than data.path"),
        ({"class_names": ("a", "b", "z")}, "has another class_names than data.path"),
        (None, "share 3 shards .first: shard-000000.tar.; what is trained on cannot validate"),
    ],
)
def test_data_that_cannot_validate_are_refused(
    tiny: dict[str, Any], other: Path, tmp_path: Path, change: dict[str, Any] | None, told: str
) -> None:
    if change is None:
        other = Path(tiny["tree"]["data"]["path"])
    else:
        Manifest.load(other).model_copy(update=change).save(other)
    ds = write_json(tmp_path / "ds.json", FP32)
    (output,) = run_ranks(1, train, *arguments(tiny, ds, f"validation.path={other}"), expect=2)
    import re

    assert re.search(told, output)


def test_both_parts_of_a_split_of_others_shards_can_be_used(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    from dit_ds import adopt, config
    from dit_ds.ddpm import DDPM
    from dit_ds.split import split
    from dit_ds.validation import Validation

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with webdataset.TarWriter(str(theirs / "0.tar")) as tar:
        for i in range(20):
            latent = np.full((4, 4, 4), i, np.float32)
            tar.write({"__key__": f"s{i}", "npy": latent, "cls": i % 3})
    adopt.index(theirs, vae=adopt.Vae(0.5), image_size=32, values="latents", workers=1)
    training, part = split(theirs, 0.2)  # the only tar is cut: two indices of the same bytes
    overrides = [f"data.path={theirs}", f"validation.path={theirs / 'validation'}"]
    cfg = config.load(str(tiny["recipe"]), overrides)
    validation = Validation(cfg, Folder(theirs / "validation"), training, DDPM.losses)
    seen = validation._samples.read_fixed(np.arange(4), 4).moments[:, 0, 0, 0].tolist()
    kept = Samples(Folder(theirs), training, seed=0, flip=0.0)
    rest = kept.read_fixed(np.arange(16), 16).moments[:, 0, 0, 0].tolist()
    assert part.num_samples == 4 and sorted(seen + rest) == list(range(20))


def test_fixed_draws_cover_the_times_evenly(tmp_path: Path) -> None:
    manifest = make_latents(tmp_path, counts=(40, 61))
    samples = Samples(Folder(tmp_path), manifest, seed=0, flip=0.5)
    whole = samples.read_fixed(np.arange(101), 101)
    times = whole.time.double().numpy()
    assert np.array_equal(np.sort((times * 101).astype(int)), np.arange(101))
    assert abs(np.corrcoef(times, np.arange(101))[0, 1]) < 0.4  # not the order of the samples
    assert (whole.drop == 1).all() and (whole.weight == 1).all()
    # A sample has the same draws in any company, and is never mirrored.
    part = samples.read_fixed(np.array([70, 3]), 4)
    for name in ("moments", "y", "posterior", "noise", "time"):
        assert torch.equal(getattr(part, name)[:2], getattr(whole, name)[[70, 3]])
    assert part.weight.tolist() == [1, 1, 0, 0]
    trained = samples.read(np.zeros(101, np.int64), np.arange(101), 101)
    assert not torch.equal(trained.noise, whole.noise)
