"""DDPM's schedule and losses are the published ones; raw draws are mapped as promised."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_ds.ddpm import DDPM
from dit_ds.models import DiT
from dit_ds.schedule import Schedule

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


@dataclass
class Draws:
    y: Tensor
    time: Tensor
    drop: Tensor
    noise: Tensor


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
