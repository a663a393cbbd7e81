"""DDPM's schedule and losses are the published ones; raw draws are mapped as promised."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_ds.ddpm import DDPM
from dit_ds.models import DiT
from dit_ds.schedule import Schedule
from tests.gaussian import Draws, Gaussian, draws

GOLDEN = np.load(Path(__file__).parent / "data" / "dit_tiny.npz")


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key])


def golden_model() -> DiT:
    model = DiT(**ast.literal_eval(str(GOLDEN["config"])))
    state = {k.removeprefix("state/"): golden(k) for k in GOLDEN if k.startswith("state/")}
    model.load_state_dict(state)
    return model


def golden_losses(model: Any) -> dict[str, Tensor]:
    x_start, noise = golden("loss/x_start"), golden("loss/noise")
    objective = DDPM(num_classes=10)
    return objective.training_losses(model, x_start, golden("loss/t"), golden("loss/y"), noise)


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod", "posterior_log_variance_clipped"])
def test_schedule_agrees_with_the_published_one(name: str) -> None:
    ours = getattr(Schedule.linear(), name)
    np.testing.assert_allclose(ours, GOLDEN[f"schedule/{name}"], rtol=1e-12, atol=0)


def test_noised_latents_agree_with_the_published_ones() -> None:
    x_t = Schedule.linear().q_sample(golden("loss/x_start"), golden("loss/t"), golden("loss/noise"))
    torch.testing.assert_close(x_t, golden("loss/x_t"), rtol=1e-5, atol=1e-6)


def test_losses_agree_with_the_published_ones() -> None:
    losses = golden_losses(golden_model())
    for name in ("mse", "vb", "loss"):
        torch.testing.assert_close(losses[name], golden(f"loss/{name}"), rtol=1e-5, atol=0)


def test_gradients_agree_with_the_published_ones() -> None:
    model = golden_model()
    golden_losses(model)["loss"].mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    names = [k.removeprefix("grad/") for k in GOLDEN if k.startswith("grad/")]
    assert len(names) == 4
    for name in names:
        expected, actual = golden(f"grad/{name}"), grads[name]
        assert actual is not None
        # Relative to the largest entry: small ones are sums that cancel.
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale, msg=name)


def test_respacing_agrees_with_the_published_timesteps() -> None:
    assert Schedule.linear().respaced(10).timesteps.tolist() == GOLDEN["ddpm/timesteps"].tolist()


@pytest.mark.parametrize("num_steps", [1, 2, 21, 250, 999, 1000])
def test_respaced_process_has_the_marginals_of_the_whole(num_steps: int) -> None:
    whole = Schedule.linear()
    part = whole.respaced(num_steps)
    assert len(set(part.timesteps)) == part.num_timesteps == num_steps
    np.testing.assert_allclose(
        np.cumprod(1 - part.betas), whole.alphas_cumprod[part.timesteps], rtol=1e-12
    )
    assert part.timesteps[0] == 0
    assert part.timesteps[-1] == (999 if num_steps > 1 else 0)


def test_raw_draws_become_timesteps_and_null_classes() -> None:
    seen: dict[str, Tensor] = {}

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.update(x=x, t=t, y=y)
        return torch.zeros(4, 8, 8, 8)

    below_one = 1 - 2**-24  # the largest uniform there is
    batch = Draws(
        y=torch.tensor([3, 4, 5, 6]),
        time=torch.tensor([0.0, 0.00099, 0.5, below_one]),
        drop=torch.tensor([0.0, 0.0999, 0.1001, below_one]),
        noise=golden("loss/noise"),
    )
    objective = DDPM(num_classes=10, class_dropout=0.1)
    losses = objective.loss(model, golden("loss/x_start"), batch)
    assert losses["t"].tolist() == seen["t"].tolist() == [0, 0, 500, 999]
    assert seen["y"].tolist() == [10, 10, 5, 6]
    expected = objective.schedule.q_sample(golden("loss/x_start"), losses["t"], batch.noise)
    assert torch.equal(seen["x"], expected)
    assert all(value.shape == (4,) for value in losses.values())


@pytest.mark.parametrize(("share", "expected"), [(0.0, [3, 3]), (1.0, [10, 10])])
def test_class_dropout_of_none_and_all(share: float, expected: list[int]) -> None:
    labels = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels.append(y.tolist())
        return torch.zeros(2, 8, 8, 8)

    drop, y, x = torch.tensor([0.0, 1 - 2**-24]), torch.tensor([3, 3]), torch.zeros(2, 4, 8, 8)
    batch = Draws(y=y, time=torch.zeros(2), drop=drop, noise=x)
    DDPM(num_classes=10, class_dropout=share).loss(model, x, batch)
    assert labels == [expected]


def test_variance_bound_trains_the_variance_only() -> None:
    out = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    golden_losses(lambda x, t, y: out)["vb"].sum().backward()
    assert out.grad is not None
    assert out.grad[:, :4].abs().max() == 0
    assert (out.grad[:, 4:].flatten(1).abs().max(1).values > 0).all()


def test_exact_noise_and_the_posteriors_variance_cost_nothing() -> None:
    exact = torch.cat([golden("loss/noise"), -torch.ones(4, 4, 8, 8)], dim=1)
    losses = golden_losses(lambda x, t, y: exact)
    assert losses["mse"].abs().max() == 0
    # KL of a distribution to itself, after float32 recovers x_0 from x_t; t = 0 is a likelihood.
    assert losses["vb"][1:].abs().max() < 1e-6


def test_without_learn_sigma_the_loss_is_the_mse() -> None:
    objective = DDPM(num_classes=10, learn_sigma=False)
    x, noise = golden("loss/x_start"), golden("loss/noise")
    losses = objective.training_losses(
        lambda x, t, y: torch.zeros_like(x), x, golden("loss/t"), golden("loss/y"), noise
    )
    torch.testing.assert_close(losses["mse"], noise.square().mean((1, 2, 3)))
    assert torch.equal(losses["loss"], losses["mse"])
    assert losses["vb"].tolist() == [0, 0, 0, 0]


def test_losses_of_a_bf16_model_are_computed_in_float32() -> None:
    out = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, single = golden_losses(lambda x, t, y: out), golden_losses(lambda x, t, y: out.float())
    for name, loss in half.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, single[name]), name


def test_losses_of_bf16_weights_are_those_of_the_model() -> None:
    loss = golden_losses(golden_model().bfloat16())["loss"]
    # bf16 keeps 8 bits: a percent of the loss, averaged over 256 values.
    torch.testing.assert_close(loss, golden("loss/loss"), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_dropout": 1.5}, "class_dropout=1.5"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_timesteps": 20}, "num_timesteps=20"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDPM(**{"num_classes": 10} | settings)


def test_a_model_without_variance_is_refused_where_one_is_learned() -> None:
    with pytest.raises(ValueError, match="learn_sigma=True needs a model that returns 8 channels"):
        golden_losses(lambda x, t, y: torch.zeros_like(x))


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_respacing_beyond_the_schedule_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps={num_steps} must be from 1 to 1000"):
        Schedule.linear().respaced(num_steps)


# --- the variants ------------------------------------------------------------------------------


def test_the_cosine_schedule_is_a_squared_cosine() -> None:
    q = Schedule.cosine()
    t = (np.arange(1, 1001) / 1000 + 0.008) / 1.008
    expected = np.cos(t * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert q.betas.max() == pytest.approx(0.999) and (q.betas[:-1] < 0.999).all()
    np.testing.assert_allclose(q.alphas_cumprod[:-1], expected[:-1], rtol=1e-9)
    with pytest.raises(ValueError, match="num_timesteps=1 must be at least 2"):
        Schedule.cosine(1)


def test_velocity_and_noise_say_the_same() -> None:
    q, batch = Schedule.linear(), draws(1000)
    t, x_start = torch.arange(1000), Gaussian(0.7, 0.4).sample(batch)
    x_t = q.q_sample(x_start, t, batch.noise)
    v = q.velocity(x_start, t, batch.noise)
    torch.testing.assert_close(q.eps_of_velocity(x_t, t, v), batch.noise, rtol=1e-5, atol=1e-5)


def optimal(data: Gaussian, objective: DDPM) -> Any:
    """The best model of Gaussian data, with variances that are as the posterior's."""
    q = objective.schedule

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        signal, noise = (
            torch.from_numpy(table)[t].view(-1, 1, 1, 1)
            for table in (q.sqrt_alphas_cumprod, q.sqrt_one_minus_alphas_cumprod)
        )
        prediction = eps = data.eps(x, signal, noise)
        if objective.prediction == "v":
            prediction = signal * eps - noise * data.x_start(x, signal, noise)
        out = [prediction, -torch.ones_like(x)] if objective.learn_sigma else [prediction]
        return torch.cat(out, dim=1).float()

    return model


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_optimal_prediction_of_gaussian_data_has_the_known_loss(
    schedule: Any, prediction: Any, gamma: float | None
) -> None:
    data, batch = Gaussian(mean=0.7, std=0.4), draws(4000)
    objective = DDPM(
        10, learn_sigma=False, schedule=schedule, prediction=prediction, min_snr_gamma=gamma
    )
    losses = objective.loss(optimal(data, objective), data.sample(batch), batch)
    a = torch.from_numpy(objective.schedule.alphas_cumprod)[losses["t"]]
    expected = data.std**2 / (a * data.std**2 + 1 - a) * (a if prediction == "eps" else 1)
    mse = losses["mse"].double() / expected
    assert abs(mse.mean() - 1) < 4 * math.sqrt(2 / 64 / 4000)
    assert mse.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    snr = a / (1 - a)
    weight = torch.ones_like(a)
    if gamma is not None:
        weight = snr.clamp(max=gamma) / (snr if prediction == "eps" else snr + 1)
    torch.testing.assert_close(losses["loss"].double(), losses["mse"] * weight, rtol=1e-5, atol=0)


def test_min_snr_weighs_the_same_error_alike_in_noise_and_velocity() -> None:
    """An error of x_0 is one of eps and of v: the weighted loss is min(SNR, gamma) times it."""
    batch = draws(500)
    x_start = Gaussian(0.7, 0.4).sample(batch)
    found = []
    for prediction in ("eps", "v"):
        objective = DDPM(10, prediction=prediction, min_snr_gamma=5.0)
        q = objective.schedule

        def model(
            x: Tensor, t: Tensor, y: Tensor, q: Schedule = q, prediction: str = prediction
        ) -> Tensor:
            wrong = x_start + 0.1
            signal = q.at("sqrt_alphas_cumprod", t)
            eps = (x - signal * wrong) / q.at("sqrt_one_minus_alphas_cumprod", t)
            out = eps if prediction == "eps" else q.velocity(wrong, t, eps)
            return torch.cat([out, torch.zeros_like(x)], dim=1)

        losses = objective.loss(model, x_start, batch)
        snr = q.alphas_cumprod[losses["t"]] / (1 - q.alphas_cumprod[losses["t"]])
        expected = 0.01 * np.minimum(snr, 5.0)
        np.testing.assert_allclose((losses["loss"] - losses["vb"])[30:], expected[30:], rtol=1e-3)
        found.append(losses["vb"])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
