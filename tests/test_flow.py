"""Flow matching: its times, its path and its loss agree with closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_ds.flow import FlowMatching
from tests.gaussian import Draws, Gaussian, draws

BELOW_ONE = 1 - 2**-24  # the largest uniform there is


def cdf_of_logit_normal(t: np.ndarray, mean: float, std: float) -> np.ndarray:
    z = (np.log(t / (1 - t)) - mean) / std
    return np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in z])


def cdf_of_cosmap(t: np.ndarray) -> np.ndarray:
    """The integral of the density of Esser et al. 2024, eq. 21, by the trapezoidal rule."""
    fine = np.linspace(0, 1, 200_001)
    density = 2 / (math.pi - 2 * math.pi * fine + 2 * math.pi * fine**2)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2) * (fine[1] - fine[0])])
    return np.interp(t, fine, area)


def test_times_have_the_densities_of_their_names() -> None:
    uniform = torch.linspace(0.001, 0.999, 999)

    def at(objective: FlowMatching) -> np.ndarray:
        return objective.times(uniform).double().numpy()

    expected = uniform.double().numpy()
    np.testing.assert_array_equal(at(FlowMatching(10)), expected)
    t = at(FlowMatching(10, time="logit-normal", logit_mean=-0.5, logit_std=1.4))
    np.testing.assert_allclose(cdf_of_logit_normal(t, -0.5, 1.4), expected, atol=1e-6)
    t = at(FlowMatching(10, time="cosmap"))
    np.testing.assert_allclose(cdf_of_cosmap(t), expected, atol=1e-6)


@pytest.mark.parametrize("time", ["uniform", "logit-normal", "cosmap"])
def test_all_uniforms_become_finite_times(time: str) -> None:
    t = FlowMatching(10, time=time, shift=3.0).times(  # type: ignore[arg-type]
        torch.tensor([0.0, 2**-24, 0.5, BELOW_ONE])
    )
    assert t.dtype == torch.float32
    assert t[0] == 0 and t.min() >= 0 and t.max() <= 1 and (t.diff() > 0).all()


def test_the_shift_divides_the_signal_to_noise_ratio() -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = FlowMatching(10, shift=3.0).shifted(t)
    torch.testing.assert_close((1 - shifted) / shifted, (1 - t) / t / 3.0)
    assert FlowMatching(10, shift=3.0).shifted(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_raw_draws_become_a_path_and_null_classes() -> None:
    seen: dict[str, Tensor] = {}

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.update(x=x, t=t, y=y)
        return torch.zeros_like(x)

    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 4, 2, 8, 8, generator=generator)
    batch = Draws(
        y=torch.tensor([3, 4, 5, 6]),
        time=torch.tensor([0.0, 0.25, 0.5, BELOW_ONE]),
        drop=torch.tensor([0.0, 0.0999, 0.1001, BELOW_ONE]),
        noise=noise,
    )
    losses = FlowMatching(10).loss(model, x_start, batch)
    assert losses["t"].tolist() == seen["t"].tolist()
    assert losses["t"].tolist() == pytest.approx([0, 250, 500, 1000])
    assert seen["y"].tolist() == [10, 10, 5, 6]
    assert torch.equal(seen["x"][0], x_start[0])
    torch.testing.assert_close(seen["x"][1], 0.75 * x_start[1] + 0.25 * noise[1])
    torch.testing.assert_close(losses["mse"], (noise - x_start).square().mean((1, 2, 3)))
    assert losses.keys() == {*FlowMatching.losses, "t"}


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_the_optimal_velocity_of_gaussian_data_has_the_known_loss(shift: float) -> None:
    data, batch = Gaussian(mean=0.7, std=0.4), draws(4000)
    objective = FlowMatching(10, class_dropout=0.0, shift=shift)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return data.velocity(x, t.view(-1, 1, 1, 1) / 1000)

    losses = objective.loss(model, data.sample(batch), batch)
    t = losses["t"].double() / 1000
    expected = data.std**2 / ((1 - t) ** 2 * data.std**2 + t**2)  # of each sample
    ratio = losses["loss"].double() / expected
    # Each is a mean of 64 squared normals: its deviation is (2 / 64)^0.5, at any time.
    assert abs(ratio.mean() - 1) < 4 * math.sqrt(2 / 64 / 4000)
    assert ratio.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    late = ratio[t > 0.9].mean()
    assert late.item() == pytest.approx(1, abs=0.05)


def test_a_model_with_a_variance_is_refused() -> None:
    batch = draws(2)
    with pytest.raises(ValueError, match="returns 1 channels, this one returns 2"):
        FlowMatching(10).loss(lambda x, t, y: torch.cat([x, x], 1), batch.noise, batch)


@pytest.mark.parametrize(
    "settings", [{"class_dropout": 1.5}, {"num_classes": 0}, {"logit_std": 0.0}, {"shift": -1.0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        FlowMatching(**({"num_classes": 10} | settings))  # type: ignore[arg-type]
