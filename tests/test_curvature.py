"""Sophia-G's curvature: the diagonal Gauss-Newton matrix of our mean loss, beside the training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dit_ds import config, draws, optim
from dit_ds.ddpm import DDPM
from dit_ds.samples import MicroBatch
from tests import runs
from tests.conftest import REPO, run_ranks

CHANNELS, SIZE, SAMPLES = 2, 3, 6
SETTINGS = config.parse(
    {
        "model": {"name": "DiT-S/2"},
        "optimizer": {"name": "sophiag", "betas": [0.9, 0.0], "gradient_clipping": 0.01},
    },
    "test",
).optimizer


class Linear(nn.Module):
    """Noise and variance as linear functions of x_t, so that the Gauss-Newton matrix is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * CHANNELS, CHANNELS))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oc,nchw->nohw", self.weight, x.to(self.weight.dtype))


def batch(epoch: int, *, rank: int, world: int) -> MicroBatch:
    """This rank's share of the same samples, of which the last one only fills up."""
    ids = np.arange(SAMPLES)
    shape = (CHANNELS, SIZE, SIZE)
    noise = torch.from_numpy(draws.normal(0, "noise", 0, ids, shape))
    mine = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    weight = torch.ones(SAMPLES)
    weight[-1] = 0
    values = {
        "moments": noise, "y": torch.zeros(SAMPLES, dtype=torch.int64), "weight": weight,
        "posterior": noise, "noise": noise, "time": torch.linspace(0.01, 0.95, SAMPLES),
        "drop": torch.ones(SAMPLES), "ids": torch.from_numpy(ids),
        "epochs": torch.full((SAMPLES,), epoch),
    }  # fmt: skip
    return MicroBatch(**{name: value[mine] for name, value in values.items()})


def x_start(micro: MicroBatch) -> torch.Tensor:
    return torch.from_numpy(
        draws.normal(0, "posterior", 0, micro.ids.numpy(), (CHANNELS, SIZE, SIZE))
    )


def analytic() -> torch.Tensor:
    """The diagonal of the Gauss-Newton matrix of the mean loss, (2C, C) float64."""
    objective, micro = DDPM(1), batch(0, rank=0, world=1)
    q = objective.schedule
    t = (micro.time * 1000).long()
    x_t = q.q_sample(x_start(micro), t, micro.noise).double()
    squares = (x_t.square().sum((2, 3)) * micro.weight[:, None]).T  # (C, N)
    num_elements = (SAMPLES - 1) * CHANNELS * SIZE * SIZE
    half_width = (q.log_betas - q.posterior_log_variance_clipped)[t] / 2
    # d2/dv2 of the KL divergence in bits where the variance is right: half_width^2 / 2 / log 2.
    of_v = torch.from_numpy(half_width**2 / 2 / math.log(2))
    of_eps = torch.full_like(of_v, 2.0)
    rows = [(squares * weight).sum(1) / num_elements for weight in (of_eps, of_v)]
    return torch.cat([row.expand(CHANNELS, -1) for row in rows])


def mean_estimate(ds_config: dict[str, Any], micro_steps: int, num_estimates: int) -> list[float]:
    """In a rank: the mean of many estimates; the last of them is in the optimizer's state."""
    import deepspeed

    from dit_ds import distributed, zero
    from dit_ds.curvature import Curvature

    distributed.init()
    rank, world = distributed.rank(), distributed.world_size()
    resolved = ds_config | {
        "train_micro_batch_size_per_gpu": SAMPLES // world,
        "gradient_accumulation_steps": micro_steps,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.01,
    }
    stage = ds_config["zero_optimization"]["stage"]
    with deepspeed.zero.Init(config_dict_or_path=resolved, enabled=stage == 3):
        model = Linear()
    optimizer = optim.build(model.parameters(), SETTINGS, zero_stage=stage)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=resolved, dist_init_required=False
    )
    curvature = Curvature(
        engine, every=1, seed=0, channels=2 * CHANNELS,
        probe=lambda model, micro, normals: DDPM(1).probe(model, x_start(micro), micro, normals),
    )  # fmt: skip
    total = torch.zeros(2 * CHANNELS * CHANNELS, dtype=torch.float64)
    for number in range(num_estimates):
        curvature.estimate(batch(number, rank=rank, world=world))
        for flat in zero.flats(engine):
            for f in flat.written:
                h = optimizer.state[flat.tensor]["hessian"].view(-1)
                total[f.offset : f.offset + f.length] += h[f.start : f.start + f.length]
    return (distributed.reduce_sum(total) / num_estimates).tolist()


BY_DEFAULT = ((0, 2, 3), (1, 2, 1), (2, 2, 3), (3, 1, 1), (3, 2, 3))


@pytest.mark.parametrize(
    ("stage", "world", "micro_steps"),
    [
        (stage, world, micro_steps)
        if (stage, world, micro_steps) in BY_DEFAULT
        else pytest.param(stage, world, micro_steps, marks=pytest.mark.slow)
        for stage in (0, 1, 2, 3)
        for world in (1, 2)
        for micro_steps in (1, 3)
    ],
)
def test_the_mean_of_many_estimates_is_the_diagonal_gauss_newton_matrix(
    stage: int, world: int, micro_steps: int
) -> None:
    num = 400
    ds_config = {"zero_optimization": {"stage": stage}}
    found = run_ranks(world, mean_estimate, ds_config, micro_steps, num)
    ratio = torch.tensor(found[0]).view(2 * CHANNELS, CHANNELS) / analytic()
    # Each estimate is a chi-square of one degree: its deviation is 2^0.5 of its mean.
    sigma = math.sqrt(2 / num)
    assert (ratio - 1).abs().max() < 4 * sigma, ratio
    assert abs(ratio.mean() - 1) < 2 * sigma, ratio


def train_throwing_away(estimates: bool, *arguments: str) -> None:
    """In a rank: train with estimates that are made and not used, or with none."""
    from dit_ds import train
    from dit_ds.curvature import Curvature

    step = optim.SophiaG.step

    def keep_nothing(self: optim.SophiaG) -> None:
        if self._scale is None:
            step(self)

    optim.SophiaG.step = keep_nothing  # type: ignore[assignment,method-assign]
    if not estimates:
        Curvature.due = lambda self, step: False  # type: ignore[method-assign]
    train.main(arguments)


SOPHIA = ("optimizer.name=sophiag", "optimizer.hessian_every=2", "train.steps=5")
CONFIGS = ("zero0", "zero1", "zero2_fp16", "zero2_offload", "zero3")


@pytest.mark.parametrize("name", CONFIGS)
def test_estimates_that_are_thrown_away_leave_no_trace(
    tiny: dict[str, Any], tmp_path: Path, name: str
) -> None:
    ds_config = REPO / "ds_configs" / f"{name}.json"
    words = runs.arguments(tiny, ds_config, *SOPHIA)
    run_ranks(2, train_throwing_away, False, *words)
    without = runs.state_of(tiny["run"], 5), runs.metrics(tiny["run"])
    tiny["run"] = tmp_path / "thrown-away"
    run_ranks(2, train_throwing_away, True, *runs.arguments(tiny, ds_config, *SOPHIA))
    runs.assert_same_bits(without[0], runs.state_of(tiny["run"], 5))
    same = ("loss", "gradient_norm", "lr", "skipped_steps", "loss_scale", "images")
    for a, b in zip(without[1], runs.metrics(tiny["run"]), strict=True):
        assert {k: a.get(k) for k in same} == {k: b.get(k) for k in same}


def test_sophia_follows_the_algorithm_of_the_paper() -> None:
    """Against Liu et al. 2023, algorithm 3, written down in float64."""
    rng = np.random.default_rng(0)
    lr, (beta1, beta2), gamma, eps, decay = 0.03, (0.965, 0.99), 0.01, 1e-12, 0.1
    theta = rng.normal(size=50)
    p = nn.Parameter(torch.from_numpy(theta).float())
    settings: dict[str, Any] = {"lr": lr, "weight_decay": decay, "ema_decay": 0.9}
    sophia = optim.SophiaG([p], betas=(beta1, beta2), rho=gamma, eps=eps, **settings)
    m, h, average = np.zeros(50), np.zeros(50), theta
    clipped = 0.0
    for t in range(1, 61):
        if t % 10 == 1:
            labels, num_elements = rng.normal(size=50) * np.geomspace(1e-2, 1, 50), 12
            h = beta2 * h + (1 - beta2) * num_elements / 2 * labels**2
            p.grad = torch.from_numpy(labels).float()
            with sophia.measuring(num_elements / 2):
                sophia.step()
        g = rng.normal(size=50) * 1e-3
        m = beta1 * m + (1 - beta1) * g
        theta = theta - lr * decay * theta
        clipped += (abs(m) >= np.maximum(gamma * h, eps)).mean() / 60
        theta = theta - lr * np.clip(m / np.maximum(gamma * h, eps), -1, 1)
        average = average + (theta - average) * (1 - min(0.9, (1 + t) / (10 + t)))
        p.grad = torch.from_numpy(g).float()
        sophia.step()
    assert 0.1 < clipped < 0.9  # both branches
    state = sophia.state[p]
    for found, expected in ((p.detach(), theta), (state["hessian"], h), (state["ema"], average)):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_padding_has_no_gradient_and_does_not_move() -> None:
    p = nn.Parameter(torch.zeros(4))
    sophia = optim.SophiaG([p])
    p.grad = torch.tensor([1.0, -1.0, 0.0, 0.0])
    sophia.step()
    assert p.tolist() == pytest.approx([-2e-4, 2e-4, 0, 0])


@pytest.mark.parametrize("path", ["zero3_offload", "zero2_fp16"])
def test_a_resumed_run_estimates_as_if_never_stopped(
    tiny: dict[str, Any], tmp_path: Path, path: str
) -> None:
    ds_config = REPO / "ds_configs" / f"{path}.json"
    words = (*SOPHIA, "train.checkpoint_every=2")
    run_ranks(2, runs.train, *runs.arguments(tiny, ds_config, *words))
    whole = runs.state_of(tiny["run"], 5)
    assert {k.split("/")[0] for k in whole} == {
        *("fp32", "exp_avg", "hessian", "ema", "step", "module")
    }
    assert any(v.any() for k, v in whole.items() if k.startswith("hessian"))
    tiny["run"] = tmp_path / "resumed"
    for steps in (3, 5):
        arguments = runs.arguments(tiny, ds_config, *words, f"train.steps={steps}")
        run_ranks(2, runs.train, *arguments)
    runs.assert_same_bits(whole, runs.state_of(tiny["run"], 5))


def test_ranks_stages_and_micro_batches_follow_one_curve(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    """One micro-step of the whole batch; where there are more, fewer samples make an estimate."""
    curves = []
    for stage, world, micro in ((2, 1, 12), (0, 2, 6), (1, 3, 4), (3, 2, 6)):
        ds_config = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
        tiny["run"] = tmp_path / f"{stage}-{world}"
        words = (*SOPHIA, f"train.micro_batch_size={micro}")
        run_ranks(world, runs.train, *runs.arguments(tiny, ds_config, *words))
        curves.append(
            [(m["loss"], m["hessian_norm"], m["clipped_share"]) for m in _logged(tiny["run"])]
        )
    for curve in curves[1:]:
        for found, expected in zip(curve, curves[0], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


def _logged(run: Path) -> Iterator[dict[str, float]]:
    by_step: dict[int, dict[str, float]] = {}
    for line in runs.metrics(run):
        by_step.setdefault(int(line["step"]), {}).update(line)
    yield from by_step.values()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rho": 0.1}, "optimizer.rho=0.1 has no meaning for optimizer.name=adamw"),
        ({"hessian_every": 3}, "optimizer.hessian_every=3 has no meaning"),
        ({"name": "sophiag", "rho": None}, "optimizer.rho must be set"),
        ({"name": "sophia"}, "optimizer.name=sophia"),
    ],
)
def test_settings_of_another_optimizer_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(config.ConfigError, match=sentence):
        config.parse({"model": {"name": "DiT-S/2"}, "optimizer": settings}, "test")


def test_defaults_are_those_of_the_optimizer() -> None:
    of = {
        name: config.parse({"model": {"name": "DiT-S/2"}, "optimizer": {"name": name}}, "x")
        for name in ("adamw", "sophiag")
    }
    sophia, adamw = of["sophiag"].optimizer, of["adamw"].optimizer
    assert (sophia.lr, sophia.betas, sophia.rho) == (2e-4, (0.965, 0.99), 0.01)
    assert (adamw.lr, adamw.betas, adamw.rho) == (1e-4, (0.9, 0.999), None)
    # What a run directory holds is read back as it was.
    for cfg in of.values():
        assert config.parse(cfg.model_dump(mode="json"), "x") == cfg
