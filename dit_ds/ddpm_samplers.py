"""Noise to latents by a diffusion model in discrete time: ancestral DDPM and DDIM.

Sources: Ho et al. 2020 (ancestral sampling); Nichol & Dhariwal 2021 (fewer steps, learned
variance); Song et al. 2021, "Denoising diffusion implicit models"; Salimans & Ho 2022
(v-prediction).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dit_ds.batch import Predict
from dit_ds.ddpm import DDPM, split_output
from dit_ds.schedule import Schedule

_LEAST_LOG_SNR = -5.1
"""Least log(signal / noise) of a step whose noise is predicted: x_0 is (x - noise) / signal there,
and an error of the model is divided by the signal too. The linear schedule ends at -5.06, the
cosine one at -9.9. The number is that of diffusers' `lambda_min_clipped` for cosine schedules."""


def usable(objective: DDPM) -> Schedule:
    """The steps of the objective's schedule that sampling may use: all, but for noise on cosine."""
    schedule = objective.schedule
    if objective.prediction == "v" or objective.schedule_name == "linear":
        return schedule
    signal = schedule.alphas_cumprod
    num = int((signal / (1.0 - signal) >= math.exp(2 * _LEAST_LOG_SNR)).sum())
    return Schedule(signal[:num], schedule.timesteps[:num])


def denoise(
    predict: Predict,
    objective: DDPM,
    y: Tensor,
    noise_at: Callable[[int], Tensor],
    *,
    steps: int,
    eta: float | None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Walk down the schedule from noise to latents (N, C, H, W) float32 of classes y (N,).

    predict: (x, timestep, y) to what the objective predicts, and its variance. noise_at(k) is
    standard normal noise of the latents' shape: k = 0 the start, k = 1, 2, ... the noise of each
    step taken. eta None is the ancestral sampler, a number is DDIM. Latents are not clipped.
    """
    schedule = usable(objective).respaced(steps)
    x = noise_at(0)
    for k, i in enumerate(reversed(range(steps)), start=1):
        out = predict(x, int(schedule.timesteps[i]), y)
        prediction, v = split_output(out, x.shape[1], objective.learn_sigma)
        x_start, eps = data_and_noise(objective, prediction, x, float(schedule.alphas_cumprod[i]))
        mean, std = (
            ddpm_step(schedule, x, i, x_start, v)
            if eta is None
            else ddim_step(schedule, i, x_start, eps, eta)
        )
        # The last step adds no noise: it gives the mean of x_0.
        x = mean if i == 0 or eta == 0.0 else mean + std * noise_at(k)
        on_step()
    return x


def data_and_noise(
    objective: DDPM, prediction: Tensor, x: Tensor, alpha_cumprod: float
) -> tuple[Tensor, Tensor]:
    """The x_0 and the noise that a prediction at x_t means, each (N, C, H, W).

    Source: Ho et al. 2020, eq. 4; Salimans & Ho 2022, appendix D.
    """
    # Python's float64: in float32, 1 - alpha_cumprod has three digits left near the data.
    signal, noise = math.sqrt(alpha_cumprod), math.sqrt(1.0 - alpha_cumprod)
    if objective.prediction == "v":  # not by way of the noise, since the signal may be almost 0
        return signal * x - noise * prediction, signal * prediction + noise * x
    return (x - noise * prediction) / signal, prediction


def ddpm_step(
    schedule: Schedule, x: Tensor, i: int, x_start: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(x_{i-1} | x_i); i is a step of the schedule.

    Without a learned variance (v None) it is beta_i. Source: Ho et al. 2020, algorithm 2; Nichol &
    Dhariwal 2021, eq. 15.
    """
    t = torch.full((len(x),), i, device=x.device)
    if v is None:
        log_variance = schedule.at("log_betas", t)
    else:
        log_variance = schedule.learned_log_variance(v, t)
    return schedule.posterior_mean(x_start, x, t), torch.exp(0.5 * log_variance)


def ddim_step(
    schedule: Schedule, i: int, x_start: Tensor, eps: Tensor, eta: float
) -> tuple[Tensor, float]:
    """Mean and standard deviation of x_{i-1} under DDIM; eta = 1 has the ancestral posterior's.

    Source: Song et al. 2021, eqs. 12 and 16.
    """
    now, before = float(schedule.alphas_cumprod[i]), float(schedule.alphas_cumprod_before[i])
    std = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
    return math.sqrt(before) * x_start + math.sqrt(1 - before - std**2) * eps, std
