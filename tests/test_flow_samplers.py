"""Samplers of flows converge as their theory says, to data that is one Gaussian."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_ds.flow import FlowMatching
from dit_ds.flow_samplers import denoise, times
from tests.gaussian import Gaussian

DATA = Gaussian(mean=0.7, std=0.5)


def noise_at(k: int, shape: tuple[int, ...] = (64, 1, 8, 8)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(k))


def run(method: Any, steps: int, shift: float = 1.0, noise: Any = noise_at) -> Tensor:
    flow = FlowMatching(1, shift=shift)
    model = DATA.model(flow)
    y = torch.zeros(len(noise(0)), dtype=torch.int64)
    return denoise(
        lambda x, t, y: model(x, torch.full(y.shape, t), y),
        flow,
        y,
        noise,
        method=method,
        steps=steps,
    )


def exact(x: Tensor) -> Tensor:
    """Where the flow leads noise x. All marginals are Gaussians, so it keeps quantiles."""
    return DATA.mean + DATA.std * x.double()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_errors_fall_with_the_order_of_the_method(method: str, order: int, shift: float) -> None:
    errors = [
        (run(method, steps, shift).double() - exact(noise_at(0))).square().mean().sqrt().item()
        for steps in (40, 80, 160)
    ]
    assert errors[0] < 0.05
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def reference(method: str, steps: int, shift: float) -> np.ndarray:
    """The same in float64, with the Gaussian's own score in place of what follows from velocity."""
    u = list(np.linspace(1, 0.04, steps)) + [0] if method == "sde" else np.linspace(1, 0, steps + 1)
    t = [shift * value / (1 + (shift - 1) * value) for value in u]
    m, s = DATA.mean, DATA.std
    x = noise_at(0).double().numpy()

    def spread(t: float) -> float:
        return (1 - t) ** 2 * s**2 + t**2

    def v(x: np.ndarray, t: float) -> np.ndarray:
        return (t - (1 - t) * s**2) / spread(t) * (x - (1 - t) * m) - m

    for k in range(steps):
        h = t[k] - t[k + 1]
        if method == "sde":  # dx = (v - w/2 score) dt + w^1/2 dW, backwards, with w = 2 t
            score = -(x - (1 - t[k]) * m) / spread(t[k])
            x = x - h * (v(x, t[k]) - t[k] * score)
            if k < steps - 1:
                x = x + math.sqrt(2 * t[k] * h) * noise_at(k + 1).double().numpy()
        elif method == "euler" or k == steps - 1:
            x = x - h * v(x, t[k])
        else:
            x = x - h / 2 * (v(x, t[k]) + v(x - h * v(x, t[k]), t[k + 1]))
    return x


@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
@pytest.mark.parametrize("steps", [2, 25])
def test_agrees_with_a_reference_in_float64(method: str, steps: int, shift: float) -> None:
    out = run(method, steps, shift).double().numpy()
    # 1e-5: rounding of float32, through so many steps.
    np.testing.assert_allclose(out, reference(method, steps, shift), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "steps", "tolerance"),
    # The SDE's last step, from t = 0.04, adds no noise: its std is 0.005 below the data's.
    [("euler", 250, 0.003), ("heun", 50, 0.001), ("sde", 250, 0.01)],
)
def test_optimal_velocity_gives_back_mean_and_covariance(
    method: str, steps: int, tolerance: float
) -> None:
    values = run(method, steps, noise=lambda k: noise_at(k, (16_384, 4, 1, 1))).double().flatten(1)
    # 65,536 numbers: standard errors 0.002, 0.0014; of a covariance of two channels 0.002.
    assert values.mean().item() == pytest.approx(DATA.mean, abs=4 * 0.002 + tolerance)
    covariance = torch.cov(values.T)
    expected = DATA.std**2 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=4 * 0.003 + tolerance)


@pytest.mark.parametrize(("method", "calls"), [("euler", 5), ("heun", 9), ("sde", 5)])
def test_the_model_is_called_so_often_and_never_at_the_data(method: Any, calls: int) -> None:
    flow, asked, steps, drawn = FlowMatching(1, shift=2.0), [], [], []

    def predict(x: Tensor, t: float, y: Tensor) -> Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    def noise(k: int) -> Tensor:
        drawn.append(k)
        return noise_at(k)

    y = torch.zeros(64, dtype=torch.int64)
    denoise(predict, flow, y, noise, method=method, steps=5, on_step=lambda: steps.append(1))
    assert len(asked) == calls and len(steps) == 5
    assert asked[0] == flow.num_timesteps and min(asked) > 0
    # No noise belongs to the ODE's steps, nor to the SDE's last.
    assert drawn == ([0, 1, 2, 3, 4] if method == "sde" else [0])


def test_times_fall_from_noise_to_data_under_the_shift() -> None:
    assert times(FlowMatching(1), 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert times(FlowMatching(1, shift=3.0), 4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert times(FlowMatching(1), 3, "sde") == pytest.approx([1, 0.52, 0.04, 0])


def test_a_model_with_a_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="build it with learn_sigma=False"):
        denoise(
            lambda x, t, y: torch.cat([x, x], dim=1),
            FlowMatching(1),
            torch.zeros(64, dtype=torch.int64),
            noise_at,
            method="euler",
            steps=2,
        )
