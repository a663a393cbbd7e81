"""Objectives out of settings, and what holds for all of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dit_ds import config, objectives
from dit_ds.ddpm import DDPM
from dit_ds.flow import FlowMatching
from dit_ds.settings import Config
from tests import runs
from tests.conftest import run_ranks
from tests.gaussian import Gaussian, draws


def load(objective: dict[str, Any], **model: Any) -> Config:
    tree = {"model": {"name": "DiT-S/2"} | model, "objective": objective}
    return config.parse(tree, "test")


def build(cfg: Config, latent_shape: tuple[int, int, int] = (4, 32, 32)) -> objectives.Objective:
    return objectives.build(
        cfg.objective,
        num_classes=10,
        learn_sigma=cfg.model.learn_sigma,
        latent_shape=latent_shape,
    )


def test_the_published_objective_is_the_default() -> None:
    objective = build(load({}))
    assert isinstance(objective, DDPM)
    assert (objective.prediction, objective.weights, objective.learn_sigma) == ("eps", None, True)
    assert objective.schedule.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])


def test_settings_reach_the_objective() -> None:
    ddpm = build(load({"prediction": "v", "schedule": "cosine", "min_snr_gamma": 5}))
    assert isinstance(ddpm, DDPM)
    assert ddpm.prediction == "v" and ddpm.schedule.betas[-1] == pytest.approx(0.999)
    assert ddpm.weights is not None
    flow = build(load({"name": "flow", "time": "logit-normal", "logit_mean": 0.5, "shift": 3}))
    assert isinstance(flow, FlowMatching)
    assert (flow.time, flow.logit_mean, flow.logit_std, flow.shift) == ("logit-normal", 0.5, 1, 3)


@pytest.mark.parametrize(
    ("shape", "shift"), [((4, 32, 32), 1.0), ((4, 64, 64), 2.0), ((16, 32, 128), 2.0)]
)
def test_the_shift_follows_the_resolution(shape: tuple[int, int, int], shift: float) -> None:
    flow = build(load({"name": "flow", "shift": "resolution"}), shape)
    assert isinstance(flow, FlowMatching) and flow.shift == pytest.approx(shift)


@pytest.mark.parametrize("objective", [{}, {"name": "flow"}, {"name": "flow", "time": "cosmap"}])
def test_a_written_configuration_reads_as_the_same(objective: dict[str, Any]) -> None:
    cfg = load(objective)
    assert config.parse(yaml.safe_load(cfg.to_yaml()), "test") == cfg
    assert cfg.model.learn_sigma == (cfg.objective.name == "ddpm")


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ({"time": "cosmap"}, "objective.time=cosmap has no meaning for objective.name=ddpm"),
        ({"shift": 3.0}, "objective.shift=3.0 has no meaning for objective.name=ddpm"),
        ({"name": "flow", "prediction": "v"}, "objective.prediction=v has no meaning for"),
        ({"name": "flow", "schedule": "cosine"}, "objective.schedule=cosine has no meaning for"),
        ({"name": "flow", "min_snr_gamma": 5}, "objective.min_snr_gamma=5.0 has no meaning for"),
        ({"name": "flow", "logit_std": 1}, "objective.logit_std=1.0 has no meaning for objective."),
        ({"name": "flow", "shift": 0}, "objective.shift"),
        ({"name": "flow", "shift": "large"}, "objective.shift"),
        ({"name": "score"}, "objective.name=score"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(objective: dict[str, Any], sentence: str) -> None:
    with pytest.raises(config.ConfigError) as error:
        load(objective)
    assert sentence in str(error.value)


def test_a_variance_is_refused_under_flow() -> None:
    with pytest.raises(config.ConfigError, match="model.learn_sigma=True has no meaning for obj"):
        load({"name": "flow"}, learn_sigma=True)


@pytest.mark.parametrize(
    "objective",
    [
        FlowMatching(10),
        DDPM(10, learn_sigma=False, prediction="v"),
        DDPM(10, learn_sigma=False, min_snr_gamma=5.0),
    ],
    ids=["flow", "v", "min-snr"],
)
def test_the_probe_has_the_curvature_of_the_loss(objective: objectives.Objective) -> None:
    """Summed over a basis in the place of random normals, so exactly: J^T J against the Hessian."""
    batch = draws(5)
    x_start = Gaussian(0.7, 0.4).sample(batch)
    weight = torch.tensor([0.3, -0.2], requires_grad=True)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return weight[0] * x + weight[1] * (t / 1000).view(-1, 1, 1, 1)

    def loss(w: Tensor) -> Tensor:
        return objective.loss(
            lambda x, t, y: w[0] * x + w[1] * (t / 1000).view(-1, 1, 1, 1), x_start, batch
        )["loss"].mean()

    expected = torch.autograd.functional.hessian(loss, weight.detach()).diagonal()
    total, size = torch.zeros(2), batch.noise.numel()
    for i in range(size):
        normals = torch.zeros(size)
        normals[i] = 1.0
        probe = objective.probe(model, x_start, batch, normals.view_as(batch.noise)).sum()
        (gradient,) = torch.autograd.grad(2 / size * probe, weight)
        total += size / 2 * gradient.square()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=0)


FLOW = ("objective.name=flow", "objective.time=logit-normal")


def test_flow_matching_trains_alike_on_all_worlds_and_resumes(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    curves = []
    for stage, world in ((0, 1), (2, 2), (3, 3)):
        ds_config = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
        tiny["run"] = tmp_path / f"{stage}-{world}"
        for steps in (3, 6):
            words = (*FLOW, f"train.steps={steps}")
            run_ranks(world, runs.train, *runs.arguments(tiny, ds_config, *words))
        curves.append(runs.losses(tiny["run"]))
        assert all("vb" not in line for line in runs.metrics(tiny["run"]))
    assert len(curves[0]) == 6 and math.isfinite(sum(curves[0]))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)
