"""Post-hoc EMA: any length afterwards, equal to the average that was tracked all along."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dit_ds import config, export, optim, posthoc, profiles
from dit_ds.profiles import Profile
from tests import runs
from tests.conftest import REPO, run_ranks

STEPS = 12
KEPT = (0.05, 0.10)
SNAPSHOTS = ("post_hoc_ema.every=2", "train.keep_checkpoints=20", "train.checkpoint_every=1")


def tracked(weights: np.ndarray, length: float) -> np.ndarray:
    """The average of weights (steps, ...) by its recursion, Karras et al. 2024, section 3.1."""
    gamma, average = profiles.exponent(length), np.zeros_like(weights[0])
    for t, w in enumerate(weights, start=1):
        beta = (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * w
    return average


def trajectory(run: Path) -> dict[str, np.ndarray]:
    """Every parameter after each step, (steps, ...) float64, from the checkpoints of all steps."""
    states = [runs.state_of(run, step + 1) for step in range(STEPS)]
    names = [key.removeprefix("fp32/") for key in states[0] if key.startswith("fp32/")]
    return {n: np.stack([s[f"fp32/{n}"].double().numpy() for s in states]) for n in names}


@pytest.mark.parametrize(
    "legs",  # stage, world, and the step that it trains to
    [
        [(2, 2, 5), (3, 1, STEPS)],
        [(3, 2, 6), (1, 1, STEPS)],
    ],
    ids=str,
)
def test_any_length_is_the_average_tracked_all_along(
    tiny: dict[str, Any], tmp_path: Path, legs: list[tuple[int, int, int]]
) -> None:
    for stage, world, steps in legs:
        ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
        words = runs.arguments(tiny, ds, *SNAPSHOTS, f"train.steps={steps}")
        run_ranks(world, runs.train, *words)
    weights = trajectory(tiny["run"])
    state = runs.state_of(tiny["run"], STEPS)
    for key, length in zip(optim.PROFILES, KEPT, strict=True):
        found = export.from_run(tiny["run"], ema_length=length)
        assert found.about.ema_length == length
        for name, values in weights.items():
            assert torch.equal(found.state[name], state[f"{key}/{name}"])  # bitwise
            # Twelve roundings of float32, of weights of at most 1.
            np.testing.assert_allclose(found.state[name], tracked(values, length), atol=5e-7)
    for length in (0.06, 0.08, 0.14):
        found = export.from_run(tiny["run"], ema_length=length)
        norm, left = distance(length)
        errors, moved, apart, num = 0.0, 0.0, 0.0, 0
        for name, values in weights.items():
            expected = tracked(values, length)
            errors += np.square(found.state[name].double().numpy() - expected).sum()
            moved += np.square(values - values[-1]).sum()
            apart += min(np.square(expected - tracked(values, kept)).sum() for kept in KEPT)
            num += expected.size
        # By Cauchy and Schwarz: the profiles' distance times that of the weights from the last.
        assert math.sqrt(errors) < left * norm * math.sqrt(moved) + 1e-6 * math.sqrt(num)
        assert errors < apart / 100  # and it is not the nearest kept one that came out


def distance(length: float) -> tuple[float, float]:
    """Norm of the wanted profile, and what the snapshots of every second step leave of it."""
    stored = [Profile(t, profiles.exponent(kept)) for t in range(2, STEPS + 1, 2) for kept in KEPT]
    wanted = Profile(STEPS, profiles.exponent(length))
    norm = math.sqrt(profiles.inner_products([wanted], [wanted])[0, 0])
    return norm, profiles.combination(stored, wanted)[1]


def test_profiles_have_their_length_and_inner_products() -> None:
    tau = (np.arange(200_000) + 0.5) / 20_000  # (0, 10]
    shapes = []
    for length, time in ((0.05, 10.0), (0.1, 7.0), (0.2, 10.0), (profiles.LONGEST, 4.0)):
        g = profiles.exponent(length)
        p = np.where(tau <= time, (g + 1) / time ** (g + 1) * tau**g, 0) / 20_000
        mean = (p * tau).sum()
        assert p.sum() == pytest.approx(1, rel=1e-6)
        assert math.sqrt((p * (tau - mean) ** 2).sum()) / time == pytest.approx(length, rel=1e-5)
        assert profiles.length(g) == pytest.approx(length, rel=1e-9)
        shapes.append((Profile(time, g), p * 20_000))
    ours, values = [s for s, _ in shapes], np.array([v for _, v in shapes])
    by_sum = values @ values.T / 20_000
    np.testing.assert_allclose(profiles.inner_products(ours, ours), by_sum, rtol=1e-4)


def test_more_snapshots_come_nearer_and_weights_that_stay_are_exact() -> None:
    wanted, before = Profile(1000.0, profiles.exponent(0.2)), 1.0
    for num in (2, 4, 8, 16, 200):
        times = [1000 * (i + 1) / num for i in range(num)]
        stored = [Profile(t, profiles.exponent(length)) for t in times for length in KEPT]
        weights, left = profiles.combination(stored, wanted)
        assert left < before * 0.7
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        before = left


@pytest.mark.parametrize("name", ["adamw", "sophiag"])
def test_every_optimizer_tracks_both_profiles(name: str) -> None:
    settings = config.parse({"model": {"name": "DiT-S/2"}, "optimizer": {"name": name}}, "x")
    p = nn.Parameter(torch.ones(20))
    optimizer = optim.build([p], settings.optimizer, zero_stage=0, ema_lengths=KEPT)
    optim.set_learning_rate(optimizer, 0.1)
    weights, rng = [], np.random.default_rng(0)
    for _ in range(60):
        p.grad = torch.from_numpy(rng.normal(size=20)).float()
        optimizer.step()
        weights.append(p.detach().double().numpy())
    state = optimizer.state[p]
    assert optimizer.vector_state[-3:] == ("ema", *optim.PROFILES) and set(state) == {
        *optimizer.vector_state, *optimizer.scalar_state
    }  # fmt: skip
    for key, length in zip(optim.PROFILES, KEPT, strict=True):
        expected = tracked(np.array(weights), length)
        np.testing.assert_allclose(state[key].numpy(), expected, rtol=1e-5, atol=1e-6)
    # Where one step hardly counts: float32 has 1 - 1e-6 to two digits only.
    state["step"].fill_(1e6 - 1)
    state["ema_long"].zero_()
    optimizer.step()
    share = -math.expm1((profiles.exponent(0.1) + 1) * math.log1p(-1e-6))
    np.testing.assert_allclose(state["ema_long"].numpy(), p.detach().numpy() * share, rtol=1e-5)


FP32 = REPO / "ds_configs/zero2_fp32.json"


def short(tiny: dict[str, Any], *words: str, world: int = 1, ds: Path = FP32) -> Path:
    """A run of six steps with snapshots at each."""
    words = ("post_hoc_ema.every=1", "train.checkpoint_every=2", *words)
    run_ranks(world, runs.train, *runs.arguments(tiny, ds, *words))
    return Path(tiny["run"])


def test_a_resumed_run_has_the_same_averages(tiny: dict[str, Any], tmp_path: Path) -> None:
    """In fp16, with steps that are skipped before and after; tests/test_muon.py has offload."""
    fp16 = {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 1}
    tree = {"zero_optimization": {"stage": 2}, "fp16": fp16}
    ds = runs.write_json(tmp_path / "ds.json", tree)
    whole = short(tiny, world=2, ds=ds)
    tiny["run"] = tmp_path / "resumed"
    short(tiny, "train.steps=3", world=2, ds=ds)
    run = short(tiny, world=2, ds=ds)
    skipped = runs.metrics(run)[-1]["skipped_steps"]
    num_applied = 6 - skipped
    assert runs.state_of(run, 6)["step/x_embedder.proj.bias"] == num_applied
    assert len(list((run / "ema").iterdir())) > num_applied  # some are of the same averages
    runs.assert_same_bits(runs.state_of(whole, 6), runs.state_of(run, 6))
    assert {path.name for path in (run / "ema").iterdir()} == {
        path.name for path in (whole / "ema").iterdir()
    }
    a, b = (export.from_run(at, ema_length=0.06).state for at in (whole, run))
    runs.assert_same_bits(a, b)


def test_who_goes_back_leaves_no_snapshot_of_the_other_way(tiny: dict[str, Any]) -> None:
    run = short(tiny, "train.steps=4")
    (run / "checkpoints/latest").write_text("step-00000002\n")
    # Ends before the next snapshot is written: nothing of steps 3 and 4 may be left.
    run_ranks(1, going_back, *runs.arguments(tiny, FP32), expect=2)
    assert sorted(p.name for p in (run / "ema").iterdir()) == ["step-00000001", "step-00000002"]
    short(tiny, "train.steps=4")
    assert len(list((run / "ema").iterdir())) == 4


def going_back(*arguments: str) -> None:
    """Train until the first step is to be taken."""
    from dit_ds import loader

    def no_data(self: loader.Loader) -> Any:
        raise SystemExit(2)

    loader.Loader.next = no_data  # type: ignore[method-assign]
    runs.train(*arguments, "post_hoc_ema.every=1", "train.checkpoint_every=2")


def snapshots_last(*arguments: str) -> list[str]:
    """Train, with snapshots that are written only just before they are waited for."""
    from dit_ds import checkpoint

    commit, committing = checkpoint.Checkpoints.commit, checkpoint.Checkpoints._commit
    early: list[str] = []

    def late(self: checkpoint.Checkpoints, *, wait: bool = False) -> Any:
        return commit(self, wait=wait) if wait or self._keep is not None else None

    def checked(self: checkpoint.Checkpoints, pending: Any) -> Path:
        ema = self._root.parent / "ema"
        wanted = [ema / f"step-{step:08d}" for step in range(2, pending.step + 1, 2)]
        early.extend(path.name for path in wanted if self._keep is not None and not path.is_dir())
        return committing(self, pending)

    checkpoint.Checkpoints.commit = late  # type: ignore[method-assign]
    checkpoint.Checkpoints._commit = checked  # type: ignore[method-assign]
    runs.train(*arguments)
    return early


def test_a_checkpoint_comes_after_the_snapshots_before_it(tiny: dict[str, Any]) -> None:
    words = ("post_hoc_ema.every=2", "train.checkpoint_every=3")
    assert run_ranks(1, snapshots_last, *runs.arguments(tiny, FP32, *words)) == [[]]


def test_what_cannot_be_had_is_told(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = short(tiny)
    for length, sentence in (
        (0.004, "profile is .*% off, more than 5%; lengths from .* to .* can be had"),
        (0.3, "--ema-length 0.3: lengths are above 0 and at most 0.2887"),
        (0.0, "--ema-length 0.0: lengths are above 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            export.from_run(run, ema_length=length)
    # What is told to be reachable is.
    with pytest.raises(ValueError) as refused:
        export.from_run(run, ema_length=0.004)
    first, last = str(refused.value).split("lengths from ")[1].split(" can be")[0].split(" to ")
    for length in (float(first), float(last)):
        assert export.from_run(run, ema_length=length)

    before = export.from_run(run, ema_length=0.13).state
    file = run / "ema/step-00000003/rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    without = export.from_run(run, ema_length=0.13).state
    assert "damaged snapshot not used: " in "".join(capsys.readouterr())
    shutil.rmtree(file.parent)
    runs.assert_same_bits(without, export.from_run(run, ema_length=0.13).state)
    assert any(not torch.equal(before[name], without[name]) for name in before)

    tiny["run"] = tmp_path / "plain"
    run_ranks(1, runs.train, *runs.arguments(tiny, FP32))
    with pytest.raises(ValueError, match="--ema-length 0.1: .* train with post_hoc_ema.every=STEP"):
        export.from_run(tiny["run"], ema_length=0.1)
    assert not (tiny["run"] / "ema").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"every": 500_000}, "post_hoc_ema.every=500000 makes no snapshot in train.steps=400000"),
        ({"lengths": [0.04, 0.1]}, "post_hoc_ema.lengths=.* has no meaning without snapshots"),
        ({"every": 5, "lengths": [0.1, 0.05]}, "post_hoc_ema.lengths=.* not in order"),
        ({"every": 5, "lengths": [0.1, 0.1]}, "post_hoc_ema.lengths=.* too near each other"),
        ({"every": 5, "lengths": [0.1, 0.3]}, "post_hoc_ema.lengths.1=0.3: "),
        ({"every": 5, "lengths": [0.1]}, "post_hoc_ema.lengths"),
    ],
)
def test_lengths_that_cannot_be_kept_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(config.ConfigError, match=sentence):
        config.parse({"model": {"name": "DiT-S/2"}, "post_hoc_ema": settings}, "test")


def test_memory_and_disk_are_what_the_documentation_says(tiny: dict[str, Any]) -> None:
    run = short(tiny, "train.steps=2")
    snapshot = posthoc.Checkpoint.open(run / "ema/step-00000001", holding="ema_short")
    num = sum(p.numel for p in snapshot.index.parameters.values())
    (entry,) = (f for name, f in snapshot.index.files.items() if name.startswith("rank"))
    assert 8 * num <= entry.num_bytes < 8 * num + 20_000  # the rest is the header
