"""Samplers are the published ones, exact where theory is, and blind to batches and ranks."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_ds.ddpm import DDPM
from dit_ds.ddpm_samplers import denoise, usable
from dit_ds.flow import FlowMatching
from dit_ds.models import DiT
from dit_ds.objectives import Objective
from dit_ds.samplers import (
    OF_DDPM,
    OF_FLOW,
    SamplerSettings,
    check,
    default_sampler,
    guide,
    sample,
)
from dit_ds.schedule import Schedule
from dit_ds.settings import Sampler
from tests.gaussian import Gaussian

GOLDEN = np.load(Path(__file__).parent / "data" / "dit_tiny.npz")
PUBLISHED = SamplerSettings(cfg_scale=4.0, cfg_channels=3)
SHAPE = (4, 8, 8)
TRAINED = DDPM(10)  # what the golden model is for
FLOW = FlowMatching(10)


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key])


@pytest.fixture(scope="module")
def model() -> DiT:
    model = DiT(**ast.literal_eval(str(GOLDEN["config"])))
    state = {k.removeprefix("state/"): golden(k) for k in GOLDEN if k.startswith("state/")}
    model.load_state_dict(state)
    return model


def sample_tiny(
    model: Any,
    classes: list[int],
    ids: Any = None,
    objective: Objective = TRAINED,
    **settings: Any,
) -> Tensor:
    return sample(
        model,
        objective,
        SamplerSettings(**{"steps": 5} | settings),
        classes=torch.tensor(classes, dtype=torch.int64),
        latent_shape=SHAPE,
        image_ids=ids,
        progress=False,
    )


class Recorder:
    """Passes calls on and remembers their timestep and batch size."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[tuple[int, int]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((int(t[0]), len(x)))
        return self.model(x, t, y)


def test_guidance_agrees_with_the_published_one(model: DiT) -> None:
    # Published calls pass a doubled batch and return it doubled; the first half is the answer.
    x, t, y = golden("cfg/x")[:2], int(GOLDEN["cfg/t"][0]), golden("cfg/y")[:2]
    with torch.no_grad():
        out = guide(model, TRAINED, PUBLISHED)(x, t, y)
    expected = golden("cfg/out")[:2]
    scale = expected.abs().max().item()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", None), ("ddim", 0.0)])
def test_sampler_agrees_with_the_published_one(model: DiT, sampler: str, eta: float | None) -> None:
    z, noise, y = (golden(f"{sampler}/{key}") for key in ("z", "noise", "y"))
    with torch.no_grad():
        out = denoise(
            guide(model, TRAINED, PUBLISHED),
            TRAINED,
            y[:2],
            lambda k: z[:2] if k == 0 else noise[k - 1, :2],
            steps=10,
            eta=eta,
        )
    expected = golden(f"{sampler}/out")
    # 1e-4 of the scale: rounding, carried through ten steps at guidance 4.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


EACH = [(TRAINED, name) for name in OF_DDPM] + [(FLOW, name) for name in OF_FLOW]


@pytest.mark.parametrize(("objective", "sampler"), EACH)
def test_batch_size_changes_no_noise_and_hardly_a_pixel(
    model: DiT, objective: Objective, sampler: str
) -> None:
    def as_trained(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == (torch.int64 if objective is TRAINED else torch.float32)
        return model(x, t, y)[:, : 8 if objective is TRAINED else 4]

    def zeros(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(as_trained(x[:1], t[:1], y[:1])).repeat(len(x), 1, 1, 1)

    eta = 0.5 if sampler == "ddim" else 0.0
    classes = [0, 1, 2, 3, 4, 5, 6]
    options: dict[str, Any] = dict(objective=objective, sampler=sampler, eta=eta)
    noise = [sample_tiny(zeros, classes, batch_size=b, **options) for b in (1, 3, 7)]
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0], noise[2])
    images = [sample_tiny(as_trained, classes, batch_size=b, **options) for b in (1, 3, 7)]
    # Matrix products of another size sum in another order.
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=1e-4, atol=1e-4)


def test_ranks_that_take_slices_make_the_images_of_one(model: DiT) -> None:
    classes, ids = [0, 1, 2, 3, 4], [7, 1, 900, 2, 3]
    whole = sample_tiny(model, classes, ids)
    parts = [sample_tiny(model, classes[r::2], ids[r::2]) for r in (0, 1)]
    torch.testing.assert_close(parts[0], whole[0::2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts[1], whole[1::2], rtol=1e-4, atol=1e-4)
    assert sample_tiny(model, [], []).shape == (0, *SHAPE)


def test_seeds_and_images_differ(model: DiT) -> None:
    one = sample_tiny(model, [3, 3])
    assert (one[0] - one[1]).abs().max() > 0.1
    assert (one - sample_tiny(model, [3, 3], seed=1)).abs().max() > 0.1


def test_no_guidance_costs_one_pass(model: DiT) -> None:
    recorder = Recorder(model)
    sample_tiny(recorder, [1, 2, 3])
    assert [n for _, n in recorder.calls] == [3] * 5


def test_guidance_interval_guides_inside_only(model: DiT) -> None:
    recorder = Recorder(model)
    sample_tiny(recorder, [1, 2], cfg_scale=3.0, guidance_interval=(0.25, 0.5))
    assert recorder.calls == [(999, 2), (749, 2), (500, 4), (250, 4), (0, 2)]


def test_guidance_interval_counts_in_a_flows_time(model: DiT) -> None:
    recorder = Recorder(lambda x, t, y: model(x, t, y)[:, :4])
    options: dict[str, Any] = dict(cfg_scale=3.0, guidance_interval=(0.25, 0.75), steps=4)
    sample_tiny(recorder, [1, 2], objective=FLOW, sampler="heun", **options)
    # Heun asks at the end of its step too, and there the end's time counts.
    calls = [(1000, 2), (750, 4), (750, 4), (500, 4), (500, 4), (250, 4), (250, 4)]
    assert recorder.calls == calls


def test_guiding_velocities_is_guiding_noise() -> None:
    # What is exact of a Gaussian's velocity, class by class, once as v and once as eps.
    data = {0: Gaussian(-0.5, 0.5), 10: Gaussian(0.5, 0.5)}

    def model(objective: DDPM) -> Any:
        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            rows = [data[int(c)].model(objective)(x[i : i + 1], t[:1], y) for i, c in enumerate(y)]
            return torch.cat(rows)

        return predict

    images = [
        sample_tiny(model(objective), [0, 0], None, objective, sampler=sampler, cfg_scale=2.0)
        for objective in (DDPM(10, learn_sigma=False, prediction=p) for p in ("eps", "v"))
        for sampler in OF_DDPM
    ]
    for eps, v in zip(images[:3], images[3:], strict=True):
        torch.testing.assert_close(v, eps, rtol=1e-4, atol=1e-4)


def test_an_interval_without_timesteps_is_guidance_off(model: DiT) -> None:
    off = sample_tiny(model, [1, 2])
    assert torch.equal(off, sample_tiny(model, [1, 2], cfg_scale=3.0, guidance_interval=(1, 1)))
    assert not torch.allclose(off, sample_tiny(model, [1, 2], cfg_scale=3.0), atol=1e-2)


def test_guidance_reaches_the_channels_asked_for_and_never_the_variance(model: DiT) -> None:
    x, y = golden("cfg/x")[:2], golden("cfg/y")[:2]

    def predict(**settings: Any) -> Tensor:
        with torch.no_grad():
            return guide(model, TRAINED, SamplerSettings(**settings))(x, 431, y)

    plain, null = predict(), model(x, torch.full_like(y, 431), torch.full_like(y, 10)).detach()
    three, every = predict(cfg_scale=2.0, cfg_channels=3), predict(cfg_scale=2.0)
    extrapolated = 2 * plain - null
    torch.testing.assert_close(three[:, :3], extrapolated[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(three[:, 3:], plain[:, 3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(every[:, :4], extrapolated[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(every[:, 4:], plain[:, 4:], rtol=1e-4, atol=1e-5)


class Gaussians:
    """The optimal model of classes whose every value is N(y / 2, spread^2), in closed form."""

    spread = 0.5

    def __init__(self, steps: int, learn_sigma: bool) -> None:
        self.schedule = Schedule.linear().respaced(steps)
        self.step_of = {int(t): i for i, t in enumerate(self.schedule.timesteps)}
        self.learn_sigma = learn_sigma

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s, i = self.schedule, self.step_of[int(t[0])]
        a, variance = s.alphas_cumprod[i], self.spread**2
        mean = (y / 2).view(-1, 1, 1, 1)
        marginal = a * variance + 1 - a  # of x_t
        x_start = mean + math.sqrt(a) * variance / marginal * (x - math.sqrt(a) * mean)
        eps = (x - math.sqrt(a) * x_start) / math.sqrt(1 - a)
        if not self.learn_sigma:
            return eps
        # Variance of x_{t-1} given x_t: the posterior's, and what is unknown about x_0.
        low, high = s.posterior_log_variance_clipped[i], s.log_betas[i]
        unknown = s.posterior_mean_x_start[i] ** 2 * variance * (1 - a) / marginal
        exact = math.log(math.exp(low) + unknown)
        return torch.cat([eps, torch.full_like(eps, 2 * (exact - low) / (high - low) - 1)], dim=1)


@pytest.mark.parametrize(
    ("sampler", "eta", "steps", "learn_sigma", "tolerance"),
    [
        # With the exact variance each ancestral step is exact, however few there are.
        ("ddpm", 0.0, 10, True, 0.01),
        ("ddpm", 0.0, 1000, False, 0.01),
        # DDIM is exact in the limit: what is left shrinks with the number of steps.
        ("ddim", 0.0, 1000, False, 0.01),
        ("ddim", 1.0, 1000, False, 0.01),
    ],
)
def test_optimal_model_gives_back_its_gaussians(
    sampler: Any, eta: float, steps: int, learn_sigma: bool, tolerance: float
) -> None:
    latents = sample(
        Gaussians(steps, learn_sigma),
        DDPM(3, learn_sigma=learn_sigma),
        SamplerSettings(sampler=sampler, eta=eta, steps=steps),
        classes=torch.tensor([0, 1, 2]),
        latent_shape=(4, 64, 64),
        progress=False,
    )
    values = latents.double().flatten(1)  # 16,384 of each class: standard errors 0.004, 0.003
    for mean, std, expected in zip(values.mean(1), values.std(1), (0.0, 0.5, 1.0), strict=True):
        assert mean.item() == pytest.approx(expected, abs=4 * 0.004 + tolerance)
        assert std.item() == pytest.approx(0.5, abs=4 * 0.003 + tolerance)


def test_ddim_at_eta_one_is_ancestral_sampling_with_the_posteriors_variance() -> None:
    gaussians = Gaussians(10, learn_sigma=False)

    def lowest_variance(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([gaussians(x, t, y), -torch.ones_like(x)], dim=1)

    ddpm = sample_tiny(lowest_variance, [0, 1, 2], steps=10)
    ddim = sample_tiny(lowest_variance, [0, 1, 2], steps=10, sampler="ddim", eta=1.0)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_variants_of_ddpm_give_back_a_gaussian(
    sampler: Any, schedule: Any, prediction: Any
) -> None:
    data = Gaussian(mean=0.7, std=0.5)
    objective = DDPM(1, learn_sigma=False, schedule=schedule, prediction=prediction)
    values = sample(
        data.model(objective),
        objective,
        SamplerSettings(sampler=sampler, steps=500, batch_size=4),
        classes=torch.zeros(4, dtype=torch.int64),
        latent_shape=(4, 32, 32),
        progress=False,
    ).double()
    # 16,384 numbers: standard errors 0.004, 0.003; and 500 steps, of which DDIM leaves 0.005.
    assert values.mean().item() == pytest.approx(0.7, abs=4 * 0.004 + 0.01)
    assert values.std().item() == pytest.approx(0.5, abs=4 * 0.003 + 0.01)
    # Of channels, over 4,096 pixels: standard errors 0.006 and 0.004.
    covariance = torch.cov(values.transpose(0, 1).flatten(1))
    expected = 0.25 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, rtol=0, atol=4 * 0.006 + 0.01)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_errors_of_a_noise_prediction_do_not_drown_the_data(sampler: str) -> None:
    objective = DDPM(10, learn_sigma=False, schedule="cosine")
    exact = Gaussian(mean=0.0, std=0.5).model(objective)

    def off(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return exact(x, t, y) + 0.02

    images = sample_tiny(off, [0, 1], objective=objective, sampler=sampler, steps=50)
    # From the cosine schedule's very end, 0.02 would come out as 6.
    assert images.mean().abs() < 0.5
    assert usable(objective).num_timesteps == 996
    with pytest.raises(ValueError, match="steps=1000 exceeds the 996 timesteps.*hold signal"):
        sample_tiny(off, [0], objective=objective, sampler=sampler, steps=1000)


@pytest.mark.parametrize("steps", [1, 1000])
def test_fewest_and_most_steps_are_finite(steps: int) -> None:
    zeros = torch.zeros(2, 8, 8, 8)
    for sampler in ("ddpm", "ddim"):
        latents = sample_tiny(lambda x, t, y: zeros, [0, 1], steps=steps, sampler=sampler)
        assert torch.isfinite(latents).all()


def test_half_precision_models_give_float32_latents(model: DiT) -> None:
    half = DiT(**ast.literal_eval(str(GOLDEN["config"])))
    half.load_state_dict(model.state_dict())
    latents = sample_tiny(half.bfloat16(), [1, 2], cfg_scale=1.5)
    assert latents.dtype == torch.float32
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "plms"}, "sampler='plms'.*choose one of ddpm, ddim, dpm"),
        ({"sampler": "sde", "steps": 1}, "steps=1 is too few for sampler=sde"),
        ({"sampler": "heun", "eta": 0.5}, "eta=0.5.*not of sampler=heun"),
        ({"steps": 0}, "steps=0"),
        ({"eta": 0.5}, "eta=0.5 is a setting of DDIM"),
        ({"sampler": "ddim", "eta": 1.5}, "eta=1.5"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
        ({"cfg_scale": math.nan}, "cfg_scale=nan"),
        ({"cfg_channels": 0}, "cfg_channels=0"),
        ({"guidance_interval": (0.6, 0.2)}, r"guidance_interval=\(0.6, 0.2\)"),
        ({"guidance_interval": (0, 1000)}, r"guidance_interval=\(0, 1000\)"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSettings(**settings)


def test_arguments_that_do_not_fit_are_refused(model: DiT) -> None:
    with pytest.raises(ValueError, match="steps=1001 exceeds the 1000 timesteps"):
        sample_tiny(model, [1], steps=1001)
    with pytest.raises(ValueError, match="cfg_channels=5 exceeds the 4 channels"):
        sample_tiny(model, [1], cfg_channels=5)
    with pytest.raises(ValueError, match=r"classes=\[3, 11\] must lie in 0..9"):
        sample_tiny(model, [11, 3])
    with pytest.raises(ValueError, match="image_ids has 2 entries for 1 classes"):
        sample_tiny(model, [1], [0, 1])
    with pytest.raises(ValueError, match="learn_sigma=True needs a model that returns 8 channels"):
        sample_tiny(lambda x, t, y: x, [1])


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_sampler_of_another_objective_is_refused(sampler: Any) -> None:
    settings = SamplerSettings(sampler=sampler, steps=10)
    for objective, fitting, name in ((TRAINED, OF_DDPM, "ddpm"), (FLOW, OF_FLOW, "flow")):
        if sampler in fitting:
            check(settings, objective, latent_shape=SHAPE)
        else:
            message = f"sampler={sampler} has no meaning.*name={name}; choose one of"
            with pytest.raises(ValueError, match=message):
                check(settings, objective, latent_shape=SHAPE)


def test_without_a_choice_the_objectives_own_sampler_is_taken() -> None:
    assert (default_sampler(TRAINED), default_sampler(FLOW)) == ("ddpm", "euler")


def test_steps_of_a_flow_are_not_bound_by_its_timesteps() -> None:
    settings = SamplerSettings(sampler="euler", steps=2000)
    check(settings, FLOW, latent_shape=SHAPE)


@pytest.mark.parametrize(("objective", "sampler"), EACH)
def test_calls_are_counted(objective: Objective, sampler: Any) -> None:
    recorder = Recorder(lambda x, t, y: torch.zeros(len(x), 8 if objective is TRAINED else 4, 8, 8))
    sample_tiny(recorder, [1], objective=objective, sampler=sampler)
    assert len(recorder.calls) == SamplerSettings(sampler=sampler, steps=5).num_calls
