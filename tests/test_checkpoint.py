"""A checkpoint exists or it does not, holds everything, and loads in any topology."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_ds import archive, checkpoint, config, distributed, restore
from dit_ds.retention import Keep
from tests import runs
from tests.conftest import make_latents, make_tiny, run_ranks

FP32: dict[str, Any] = {}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 1}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def ds_config(folder: Path, stage: int, precision: dict[str, Any], **zero: Any) -> Path:
    tree = {"zero_optimization": {"stage": stage, **zero}, **precision}
    return runs.write_json(folder / f"ds-{stage}.json", tree)


@pytest.mark.parametrize(
    ("stage", "world", "precision", "zero"),
    [
        (0, 2, FP32, {}),
        (1, 2, BF16, {}),
        (2, 2, FP32, {}),
        (2, 3, BF16, {"round_robin_gradients": True}),
        (3, 2, BF16, {"sub_group_size": 5000, "stage3_param_persistence_threshold": 100}),
        (2, 2, BF16, OFFLOAD),
        (3, 2, BF16, OFFLOAD),
        (0, 2, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}),
        # A scale that overflows before and after the resume, and grows in between.
        (2, 2, FP16, {}),
    ],
    ids=str,
)
def test_resume_is_bitwise(
    tiny: dict[str, Any], tmp_path: Path, stage: int, world: int, precision: Any, zero: Any
) -> None:
    ds = ds_config(tmp_path, stage, precision, **zero)
    run_ranks(world, runs.train, *runs.arguments(tiny, ds))
    undisturbed, curve = runs.state_of(tiny["run"], 6), runs.metrics(tiny["run"])
    tiny["run"] = tmp_path / "resumed"
    # A finished run goes on when it is given a longer length.
    run_ranks(world, runs.train, *runs.arguments(tiny, ds, "train.steps=3", "data.workers=1"))
    run_ranks(world, runs.train, *runs.arguments(tiny, ds, "train.steps=6"))
    runs.assert_same_bits(undisturbed, runs.state_of(tiny["run"], 6))
    assert runs.losses(tiny["run"]) == [m["loss"] for m in curve]
    indexes = [
        json.loads((run / "checkpoints/step-00000006/index.json").read_text())
        for run in (tmp_path / "run", tiny["run"])
    ]
    for key in ("engine", "loss_scaler", "groups", "step", "keys", "parameters", "about"):
        assert indexes[0][key] == indexes[1][key]


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_state_is_bitwise_the_same_in_any_topology(
    tiny: dict[str, Any], tmp_path: Path, precision: Any
) -> None:
    first = ds_config(tmp_path, 2, precision)
    run_ranks(2, runs.train, *runs.arguments(tiny, first, "train.steps=3"))
    expected = runs.state_of(tiny["run"], 3)
    dtype = torch.bfloat16 if precision else torch.float32
    # Each loads what the one before it saved.
    topologies: list[tuple[int, int, dict[str, Any]]] = [
        *((3, 1, {}), (1, 3, {}), (3, 4, {}), (2, 4, {"round_robin_gradients": True})),
        *(
            ((1, 4, OFFLOAD), (3, 2, OFFLOAD), (1, 2, {}))
            if precision
            else ((2, 1, OFFLOAD), (0, 2, {}), (2, 3, {}), (0, 3, {}), (3, 1, OFFLOAD))
        ),
    ]
    for i, (stage, world, zero) in enumerate(topologies):
        ds = ds_config(tmp_path, stage, precision, **zero)
        out = tmp_path / f"load-{i}"
        found = run_ranks(world, load_and_save, tiny, str(ds), str(out))
        runs.assert_same_bits(expected, runs.state_of(out, 3))
        # The working weights are the rounded masters, on every rank.
        for weights in found:
            for name, values in weights.items():
                master = expected[f"fp32/{name}"].to(dtype).double()
                assert torch.equal(torch.tensor(values).view(-1), master.view(-1)), name
        tiny["run"] = out


def load_and_save(tiny: dict[str, Any], ds: str, out: str) -> dict[str, list[float]]:
    """Load a run's checkpoint into a fresh engine of this world and stage, and save it again."""
    from dit_ds import zero

    engine, about = runs.engine(tiny["recipe"], ds)
    found = restore.newest(Path(tiny["run"]) / "checkpoints")
    assert found is not None
    restore.load(engine, found)
    checkpoints = checkpoint.Checkpoints(engine, Path(out) / "checkpoints", Keep(1))
    checkpoints.save(step=3, about=about, metrics={})
    assert checkpoints.commit(wait=True) is not None
    weights = {}
    for name, p in engine.module.named_parameters():
        with zero.gathered(p):
            weights[name] = p.detach().double().flatten().tolist()
    distributed.shutdown()
    return weights


def build_an_engine(tiny: dict[str, Any], ds: str, break_it: str) -> str:
    """What is said of an engine of a DeepSpeed that changed."""
    from dit_ds import zero

    if break_it == "a name":
        zero._NAMES_BY_KIND = {k: (*v, "gone") for k, v in zero._NAMES_BY_KIND.items()}
    elif break_it == "the layout":
        found = zero.flats

        def shifted(engine: Any) -> list[zero.Flat]:
            first, *others = found(engine)
            moved = [dataclasses.replace(f, length=f.length - 1, start=f.start + 1)
                     for f in first.fragments]  # fmt: skip
            return [dataclasses.replace(first, fragments=tuple(moved)), *others]

        zero.flats = shifted
    elif break_it == "a part":
        found = zero.flats
        zero.flats = lambda engine: [
            dataclasses.replace(f, written=f.written[1:]) for f in found(engine)
        ]
    try:
        engine, _ = runs.engine(tiny["recipe"], ds)
        checkpoint.Checkpoints(engine, Path(tiny["run"]) / "checkpoints", Keep(1))
    except ValueError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_deepspeed_is_refused_before_the_first_step(
    tiny: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    ds = str(ds_config(tmp_path, stage, BF16 if stage in (1, 3) else FP32))
    assert set(run_ranks(2, build_an_engine, tiny, ds, "")) == {""}
    (said,) = run_ranks(1, build_an_engine, tiny, ds, "a name")
    assert "unknown way" in said and "no gone" in said and "constraints.txt" in said
    (said,) = run_ranks(1, build_an_engine, tiny, ds, "a part")
    assert "unknown way" in said and " values" in said
    if stage > 0:
        (said,) = run_ranks(1, build_an_engine, tiny, ds, "the layout")
        assert "the master weights of " in said and "are not where they were" in said


def values_read(tiny: dict[str, Any], ds: str) -> tuple[int, int]:
    """How many values a rank reads to load a checkpoint, and how many that holds."""
    engine, _ = runs.engine(tiny["recipe"], ds)
    found = restore.newest(Path(tiny["run"]) / "checkpoints")
    assert found is not None
    read, count = archive.Ranges.read, 0

    def counted(self: Any, key: str, name: str, offset: int, out: torch.Tensor) -> None:
        nonlocal count
        count += out.numel()
        read(self, key, name, offset, out)

    archive.Ranges.read = counted  # type: ignore[method-assign]
    restore.load(engine, found)
    return count, len(found.index.keys) * sum(p.numel for p in found.index.parameters.values())


@pytest.mark.parametrize(("stage", "world"), [(1, 3), (2, 4), (3, 3)])
def test_a_rank_reads_only_what_it_needs(
    saved: dict[str, Any], tmp_path: Path, stage: int, world: int
) -> None:
    found = run_ranks(world, values_read, saved, str(ds_config(tmp_path, stage, FP32)))
    total = found[0][1]
    assert sum(count for count, _ in found) == total
    assert all(count <= 1.1 * total / world for count, _ in found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with checkpoints at steps 3 and 6, of two ranks at stage 2."""
    folder = tmp_path_factory.mktemp("trained")
    made = make_tiny(folder)
    made["ds"] = ds_config(folder, 2, FP32)
    run_ranks(2, runs.train, *runs.arguments(made, made["ds"]))
    return made


@pytest.fixture
def saved(trained: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A copy of `trained` for one test."""
    run = tmp_path / "run"
    shutil.copytree(trained["run"], run)
    return trained | {"run": run, "six": run / "checkpoints" / "step-00000006"}


def newest(root: str) -> int:
    found = restore.newest(Path(root))
    return found.step if found else 0


@pytest.mark.parametrize(
    "damage", ["altered", "cut", "missing", "index", "half an index", "no latest", "not told of"]
)
def test_damage_is_named_and_the_one_before_is_used(
    saved: dict[str, Any], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, six = saved["run"] / "checkpoints", saved["six"]
    part = six / "rank-00001.safetensors"
    data = bytearray(part.read_bytes())
    if damage == "altered":
        data[-9] ^= 1
        part.write_bytes(data)
    elif damage == "cut":
        part.write_bytes(data[:-1])
    elif damage == "missing":
        part.unlink()
    elif damage == "index":
        (six / "index.json").write_text("{}")
    elif damage == "half an index":
        text = (six / "index.json").read_text()
        (six / "index.json").write_text(text[: len(text) // 2])
    elif damage == "no latest":
        (root / "latest").unlink()
        assert newest(str(root)) == 6
        return
    else:  # renamed, and killed before `latest`
        (root / "latest").write_text("step-00000003\n")
    assert newest(str(root)) == 3
    if damage not in ("not told of",):
        told = capsys.readouterr().err
        assert "WARNING" in told and str(six) in told
    # Training goes on from there and ends where the undisturbed run did.
    expected = runs.losses(saved["run"])
    run_ranks(2, runs.train, *runs.arguments(saved, saved["ds"]))
    assert runs.losses(saved["run"]) == expected and newest(str(root)) == 6


@pytest.mark.parametrize("text", ["", "step-00000099\n", "../x", None])
def test_a_latest_that_names_none_is_told(
    saved: dict[str, Any], text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = saved["run"] / "checkpoints"
    if text is None:  # what it named is gone
        shutil.rmtree(saved["six"])
    else:
        (root / "latest").write_text(text)
    with pytest.raises(distributed.RankError, match="latest names no checkpoint that is there"):
        restore.newest(root, strict=True)
    assert newest(str(root)) == (3 if text is None else 6)
    assert "WARNING" in capsys.readouterr().err
    shutil.rmtree(root / "step-00000003")
    shutil.rmtree(saved["six"], ignore_errors=True)
    with pytest.raises(distributed.RankError, match="to start from the beginning"):
        restore.newest(root)


def test_going_back_says_what_it_leaves(
    saved: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = saved["run"] / "checkpoints"
    (root / "latest").write_text("step-00000003\n")
    assert newest(str(root)) == 3
    assert "not used, and removed at the next save: step-00000006" in capsys.readouterr().out
    (root / "step-00000003" / "index.json").unlink()
    with pytest.raises(distributed.RankError, match="go on from step-00000006 .* write its name"):
        restore.newest(root)


def test_what_another_version_wrote_is_passed_over_and_never_removed(
    saved: dict[str, Any],
) -> None:
    path = saved["six"] / "index.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"format": 99}))
    arguments = runs.arguments(saved, saved["ds"], "train.steps=5", "train.checkpoint_every=1")
    run_ranks(2, runs.train, *arguments, "train.keep_checkpoints=1")
    assert steps_of(saved["run"]) == [5, 6]
    assert newest(str(saved["run"] / "checkpoints")) == 5


def hold_while_a_checkpoint_is_chosen(*arguments: str) -> bool:
    """Train; whether the run was held already when a checkpoint was chosen."""
    chosen, held = restore.newest, []

    def watched(root: Path, **named: Any) -> Any:
        # A record lock is this process's own, so another one has to ask.
        code = (
            "import sys, pathlib; from dit_ds import files; files.lock(pathlib.Path(sys.argv[1]))"
        )
        ask = [sys.executable, "-c", code, str(root.parent / ".lock")]
        held.append(subprocess.run(ask, capture_output=True).returncode)
        return chosen(root, **named)

    restore.newest = watched
    runs.train(*arguments)
    return held == [1]


def test_a_run_is_held_before_a_checkpoint_is_chosen(saved: dict[str, Any]) -> None:
    arguments = runs.arguments(saved, saved["ds"], "train.steps=7")
    assert run_ranks(1, hold_while_a_checkpoint_is_chosen, *arguments) == [True]


def test_strict_goes_on_from_no_earlier_checkpoint(saved: dict[str, Any]) -> None:
    part = saved["six"] / "rank-00001.safetensors"
    good = part.read_bytes()
    part.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    arguments = runs.arguments(saved, saved["ds"], "train.steps=7")
    told = run_ranks(2, runs.train, *arguments, "--strict", expect=2)
    assert f"error: {part}: altered" in told[0] and "leave --strict out" in told[0]
    assert steps_of(saved["run"]) == [3, 6]
    part.write_bytes(good)
    run_ranks(2, runs.train, *arguments, "--strict")
    assert steps_of(saved["run"]) == [3, 6, 7]


def test_no_usable_checkpoint_is_not_a_fresh_start(saved: dict[str, Any]) -> None:
    for part in saved["run"].glob("checkpoints/*/rank-00000.safetensors"):
        part.write_bytes(b"")
    told = run_ranks(2, runs.train, *runs.arguments(saved, saved["ds"]), expect=2)
    assert "no checkpoint in" in told[0] and "is usable" in told[0]


def with_small_files(limit: int, *arguments: str) -> None:
    """Train where no file can grow beyond `limit` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    runs.train(*arguments)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(saved: dict[str, Any]) -> None:
    arguments = runs.arguments(saved, saved["ds"], "train.steps=9", "train.checkpoint_every=2")
    size = (saved["six"] / "rank-00000.safetensors").stat().st_size
    told = run_ranks(2, with_small_files, size // 2, *arguments, expect=2)
    assert "training goes on and tries again" in told[0]  # at step 8
    assert "step-00000009 could not be written" in told[0]  # the last save must not fail
    root = saved["run"] / "checkpoints"
    assert newest(str(root)) == 6
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000003", "step-00000006"]


def steps_of(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def test_old_checkpoints_are_removed_after_new_ones_are_committed(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    ds = ds_config(tmp_path, 1, FP32)
    arguments = runs.arguments(tiny, ds, "train.checkpoint_every=1", "train.keep_checkpoints=2")
    run_ranks(1, runs.train, *arguments, "train.keep_every=3", "train.steps=11")
    assert steps_of(tiny["run"]) == [3, 6, 9, 10, 11]


def test_the_best_by_a_metric_stays(tiny: dict[str, Any], tmp_path: Path) -> None:
    make_latents(tmp_path / "other", counts=(9,), first=1000)
    best = "validation/loss"
    arguments = [
        *runs.arguments(tiny, ds_config(tmp_path, 2, FP32), "train.keep_checkpoints=1"),
        *(f"train.keep_best={best}", f"validation.path={tmp_path / 'other'}"),
        *("validation.every=1", "train.checkpoint_every=1", "optimizer.lr=0.05"),  # too large
    ]
    run_ranks(2, runs.train, *arguments, "train.steps=8")
    values = {int(m["step"]): m[best] for m in runs.metrics(tiny["run"]) if best in m}
    least = min(values, key=lambda step: values[step])
    assert least < 8  # or nothing is shown
    assert steps_of(tiny["run"]) == [least, 8]
    found = archive.Checkpoint.open(tiny["run"] / "checkpoints" / f"step-{least:08d}")
    assert found.index.metrics[best] == values[least]
    # Also across a resume, where a better one takes its place.
    run_ranks(2, runs.train, *arguments, "train.steps=10")
    values = {int(m["step"]): m[best] for m in runs.metrics(tiny["run"]) if best in m}
    kept = min((step for step in values if step in (least, 8, 9, 10)), key=lambda s: values[s])
    assert steps_of(tiny["run"]) == sorted({kept, 10})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["train.keep_every=4"], "train.keep_every=4 is not a multiple of train.checkpoint_every"),
        (["train.keep_best=validation/loss"], "needs validation.path"),
        (
            ["train.keep_best=validation/loss", "validation.path=x", "validation.every=2"],
            "set validation.every=3",
        ),
        (["train.keep_best=fid"], "train.keep_best=fid"),
    ],
)
def test_rules_that_cannot_work_are_refused(
    tiny: dict[str, Any], settings: list[str], sentence: str
) -> None:
    with pytest.raises(config.ConfigError, match=sentence):
        config.load(str(tiny["recipe"]), settings)


def test_a_damaged_newest_checkpoint_never_pushes_out_a_good_one(saved: dict[str, Any]) -> None:
    (saved["six"] / "rank-00000.safetensors").write_bytes(b"")
    arguments = runs.arguments(saved, saved["ds"], "train.keep_checkpoints=1", "train.steps=4")
    run_ranks(2, runs.train, *arguments)
    root = saved["run"] / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000004"]
    assert newest(str(root)) == 4


def test_a_killed_save_leaves_nothing_behind(saved: dict[str, Any]) -> None:
    root = saved["run"] / "checkpoints"
    shutil.copytree(saved["six"], root / ".step-00000008.tmp")
    (root / ".step-00000008.tmp" / "index.json").unlink()
    assert newest(str(root)) == 6
    run_ranks(2, runs.train, *runs.arguments(saved, saved["ds"], "train.steps=7"))
    assert not list(root.glob(".*"))
