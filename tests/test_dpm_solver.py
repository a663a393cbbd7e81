"""DPM-Solver++ is of second order, exact where theory is, for each objective."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from dit_ds import ddpm_samplers
from dit_ds.ddpm import DDPM
from dit_ds.dpm_solver import denoise
from dit_ds.flow import FlowMatching
from dit_ds.objectives import Objective
from tests.gaussian import Gaussian

DATA = Gaussian(mean=0.7, std=1.5)
OBJECTIVES: dict[str, Objective] = {
    f"{schedule}-{prediction}": DDPM(
        1,
        schedule=schedule,
        prediction=prediction,
        learn_sigma=False,
    )
    for schedule in ("linear", "cosine")
    for prediction in ("eps", "v")
} | {"flow": FlowMatching(1), "flow-shifted": FlowMatching(1, shift=2.0)}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run(objective: Objective, steps: int, z: Tensor) -> Tensor:
    model = DATA.model(objective)
    return denoise(
        lambda x, t, y: model(x, torch.full(y.shape, t), y),
        objective,
        torch.zeros(len(z), dtype=torch.int64),
        lambda k: z,
        steps=steps,
    )


def levels(objective: Objective, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Signal and noise, each (steps + 1,) float64, from the first step's to the data's."""
    if isinstance(objective, FlowMatching):
        u = np.linspace(1, 0, steps + 1)
        t = objective.shift * u / (1 + (objective.shift - 1) * u)
        return 1 - t, t
    table = objective.schedule.alphas_cumprod
    num = 996 if objective.prediction == "eps" and table[-1] < 1e-8 else 1000
    kept = [round(num - k * num / steps) - 1 for k in range(steps)]
    signal = np.append(table[kept], 1.0)
    return np.sqrt(signal), np.sqrt(1 - signal)


def exact(objective: Objective, z: Tensor) -> Tensor:
    """Where the ODE leads noise z. All marginals are Gaussians, so it keeps quantiles."""
    signal, sigma = (level[0] for level in levels(objective, 1))
    spread = math.sqrt(signal**2 * DATA.std**2 + sigma**2)
    return DATA.mean + DATA.std * (z.double() - signal * DATA.mean) / spread


@pytest.mark.parametrize("name", OBJECTIVES)
def test_errors_fall_with_the_square_of_the_steps(name: str) -> None:
    z = noise(64, 1, 8, 8)
    errors = [
        (run(OBJECTIVES[name], steps, z).double() - exact(OBJECTIVES[name], z)).abs().max().item()
        for steps in (25, 50, 100, 200)
    ]
    assert errors[0] < 0.06
    order = np.polyfit(np.log2([25, 50, 100, 200]), np.log2(errors), 1)[0]
    assert -2.4 < order < -1.6, errors


@pytest.mark.parametrize("name", OBJECTIVES)
def test_few_steps_are_better_than_as_many_of_first_order(name: str) -> None:
    objective, z = OBJECTIVES[name], noise(64, 1, 8, 8)
    x = z.double()
    signal, sigma = levels(objective, 10)
    # DDIM, and Euler's step of a flow, are the first order of the same.
    grid = zip(signal[:-1], sigma[:-1], signal[1:], sigma[1:], strict=True)
    for a, s, b, r in grid:
        x = b * DATA.x_start(x, a, s) + r * DATA.eps(x, a, s)
    first = (x - exact(objective, z)).abs().max()
    assert (run(objective, 10, z) - exact(objective, z)).abs().max() < 0.5 * first


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_agrees_with_the_papers_algorithm_in_float64(name: str, steps: int) -> None:
    objective, z = OBJECTIVES[name], noise(4, 1, 8, 8)
    signal, sigma = levels(objective, steps)
    with np.errstate(divide="ignore"):
        lam = np.log(signal) - np.log(sigma)
    x, before = z.double().numpy(), None
    for k in range(steps):  # Lu et al. 2022, algorithm 2; i is there k + 1
        gain = signal[k] * DATA.std**2 / (signal[k] ** 2 * DATA.std**2 + sigma[k] ** 2)
        data = DATA.mean + gain * (x - signal[k] * DATA.mean)
        d = data
        h = lam[k + 1] - lam[k]
        if before is not None and k < steps - 1:
            r = (lam[k] - lam[k - 1]) / h
            d = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before
        x = sigma[k + 1] / sigma[k] * x - signal[k + 1] * (math.exp(-h) - 1) * d
        before = data
    # 2e-4: the model's rounding is divided by the first step's signal, 0.006 at least for eps.
    np.testing.assert_allclose(run(objective, steps, z).double().numpy(), x, atol=2e-4, rtol=0)


def test_agrees_with_the_schedulers_ordinary_use() -> None:
    objective, z = OBJECTIVES["linear-eps"], noise(4, 1, 8, 8)
    assert isinstance(objective, DDPM)
    solver = DPMSolverMultistepScheduler(
        trained_betas=objective.schedule.betas, timestep_spacing="trailing"
    )
    solver.set_timesteps(20)
    x, model = z, DATA.model(objective)
    for t in solver.timesteps:
        out = model(x, t.expand(4), torch.zeros(4, dtype=torch.int64))
        x = solver.step(out, t, x).prev_sample
    # Its levels of noise are of four digits.
    torch.testing.assert_close(run(objective, 20, z), x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["linear-eps", "cosine-v", "flow"])
def test_optimal_model_gives_back_mean_and_covariance(name: str) -> None:
    values = run(OBJECTIVES[name], 50, noise(16_384, 4, 1, 1)).double().flatten(1)
    # 65,536 numbers: standard errors 0.006, and of a covariance 0.025 at most; and 50 steps.
    assert values.mean().item() == pytest.approx(DATA.mean, abs=4 * 0.006 + 0.01)
    expected = DATA.std**2 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(values.T), expected, rtol=0, atol=4 * 0.025 + 0.02)


def test_all_four_channels_are_sampled_and_the_variance_is_not() -> None:
    z = noise(2, 4, 8, 8)
    plain = OBJECTIVES["linear-eps"]
    learned = DDPM(1, learn_sigma=True)
    model = DATA.model(plain)

    def with_variance(x: Tensor, t: float, y: Tensor) -> Tensor:
        eps = model(x, torch.full(y.shape, t), y)
        return torch.cat([eps, torch.full_like(eps, 1e6)], dim=1)

    out = denoise(with_variance, learned, torch.zeros(2, dtype=torch.int64), lambda k: z, steps=10)
    assert torch.equal(out, run(plain, 10, z))


@pytest.mark.parametrize(
    ("name", "steps"), [("cosine-eps", 1), ("cosine-eps", 996), ("cosine-v", 1), ("flow", 1)]
)
def test_fewest_and_most_steps_are_finite(name: str, steps: int) -> None:
    out = run(OBJECTIVES[name], steps, noise(1, 1, 8, 8))
    assert torch.isfinite(out).all() and out.dtype == torch.float32


def test_noise_prediction_starts_where_there_is_signal() -> None:
    def num(name: str) -> int:
        objective = OBJECTIVES[name]
        assert isinstance(objective, DDPM)
        return ddpm_samplers.usable(objective).num_timesteps

    assert [num(n) for n in OBJECTIVES if "flow" not in n] == [1000, 1000, 996, 1000]
