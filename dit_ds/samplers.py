"""Noise to latents: ancestral DDPM and DDIM at any number of steps, with guidance.

Image i of a seed is made of the same noise whatever the batch size and the number of ranks: a
rank passes its slice of the classes and the ids of its images.

Sources: Ho et al. 2020 (ancestral sampling); Nichol & Dhariwal 2021 (fewer steps, learned
variance); Song et al. 2021, "Denoising diffusion implicit models"; Ho & Salimans 2022
(classifier-free guidance); Kynkäänniemi et al. 2024 (guidance in an interval).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dit_ds import draws
from dit_ds.batch import Model
from dit_ds.ddpm import split_output
from dit_ds.schedule import Schedule

Predict = Callable[[Tensor, int, Tensor], Tensor]  # (x, timestep, y) -> the model's output


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample; raises ValueError for a setting that cannot work.

    sampler: "ddpm" (ancestral) or "ddim"; steps: of the schedule's timesteps, evenly strided.
    eta: DDIM's noise, 0 (none, deterministic) to 1 (as much as the ancestral posterior).
    cfg_scale: guidance; 1 is off and costs one pass per step instead of two.
    cfg_channels: how many channels of the noise prediction are guided; None is all, 3 is what the
    published DiT does. The variance is always the conditional pass's.
    guidance_interval: guide only where lowest <= t / num_timesteps <= highest.
    batch_size: images at once; guided steps run the model on twice as many.
    """

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: int = 250
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: int | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.sampler not in ("ddpm", "ddim"):
            raise ValueError(f"sampler={self.sampler!r} is unknown; choose 'ddpm' or 'ddim'")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; choose e.g. 250")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta={self.eta} is out of range; choose from 0 to 1")
        if self.eta and self.sampler == "ddpm":
            raise ValueError(f"eta={self.eta} is a setting of DDIM; choose sampler=ddim or eta=0")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0.0):
            raise ValueError(
                f"cfg_scale={self.cfg_scale} must be a number of at least 0; 1 is no guidance"
            )
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise ValueError(
                f"cfg_channels={self.cfg_channels} must be at least 1, or None for all channels"
            )
        lowest, highest = self.guidance_interval
        if not 0.0 <= lowest <= highest <= 1.0:
            raise ValueError(
                f"guidance_interval=({lowest}, {highest}) must rise within 0 to 1, in units of "
                "t / num_timesteps; (0, 1) guides everywhere"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


def check(
    settings: SamplerSettings, *, latent_shape: tuple[int, int, int], num_timesteps: int
) -> None:
    """Raise ValueError where settings do not fit a model; `sample` does it too."""
    if settings.steps > num_timesteps:
        raise ValueError(
            f"steps={settings.steps} exceeds the {num_timesteps} timesteps of the model; choose "
            f"at most {num_timesteps}"
        )
    if settings.cfg_channels is not None and settings.cfg_channels > latent_shape[0]:
        raise ValueError(
            f"cfg_channels={settings.cfg_channels} exceeds the {latent_shape[0]} channels of the "
            "latents; choose fewer, or None for all"
        )


@torch.no_grad()
def sample(
    model: Model,
    settings: SamplerSettings,
    *,
    classes: Tensor,
    latent_shape: tuple[int, int, int],
    num_classes: int,
    image_ids: Sequence[int] | None = None,
    num_timesteps: int = 1000,
    learn_sigma: bool = True,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Tensor:
    """One latent for each class: (N, C, H, W) float32 on the CPU.

    classes: (N,) int64 in 0..num_classes, of which num_classes asks for no class in particular;
    latent_shape: (C, H, W); image_ids: the number that decides each image's noise, 0..N-1 unless
    given. The model maps (x, t, y) to noise (and variance with learn_sigma), in any dtype, and
    was trained on the linear schedule of num_timesteps. A progress bar shows on terminals only.
    Raises ValueError where the arguments do not fit each other.
    """
    ids = list(range(len(classes))) if image_ids is None else list(image_ids)
    if len(ids) != len(classes):
        raise ValueError(
            f"image_ids has {len(ids)} entries for {len(classes)} classes; give one id for each"
        )
    if len(classes) and not (0 <= int(classes.min()) and int(classes.max()) <= num_classes):
        raise ValueError(
            f"classes={sorted(set(classes.tolist()))} must lie in 0..{num_classes - 1}, or be "
            f"{num_classes} for no class"
        )
    check(settings, latent_shape=latent_shape, num_timesteps=num_timesteps)
    schedule = Schedule.linear(num_timesteps).respaced(settings.steps)
    predict = guide(model, settings, null_class=num_classes, num_timesteps=num_timesteps)
    batches = range(0, len(ids), settings.batch_size)
    latents = torch.empty(len(ids), *latent_shape)
    # disable=None is tqdm's word for "only on a terminal".
    with tqdm(
        total=len(batches) * settings.steps,
        desc=settings.sampler,
        unit="step",
        disable=None if progress else True,
    ) as bar:
        for start in batches:
            rows = slice(start, start + settings.batch_size)

            def noise_at(k: int, ids: Sequence[int] = ids[rows]) -> Tensor:
                numbers = draws.normal(settings.seed, "sample", k, ids, latent_shape)
                return torch.from_numpy(numbers).to(device)

            latents[rows] = denoise(
                predict,
                schedule,
                classes[rows].to(device),
                noise_at,
                eta=settings.eta if settings.sampler == "ddim" else None,
                learn_sigma=learn_sigma,
                on_step=bar.update,
            ).cpu()
    return latents


def guide(
    model: Model, settings: SamplerSettings, *, null_class: int, num_timesteps: int = 1000
) -> Predict:
    """The model under classifier-free guidance. Source: Ho & Salimans 2022, eq. 6."""
    lowest, highest = settings.guidance_interval

    def predict(x: Tensor, timestep: int, y: Tensor) -> Tensor:
        t = torch.full_like(y, timestep)
        if settings.cfg_scale == 1.0 or not lowest <= timestep / num_timesteps <= highest:
            return model(x, t, y)
        labels = torch.cat([y, torch.full_like(y, null_class)])
        out = model(torch.cat([x, x]), torch.cat([t, t]), labels).float()
        given, free = out.chunk(2)  # each (N, 2C or C, H, W)
        c = x.shape[1] if settings.cfg_channels is None else settings.cfg_channels
        eps = free[:, :c] + settings.cfg_scale * (given[:, :c] - free[:, :c])
        return torch.cat([eps, given[:, c:]], dim=1)

    return predict


def denoise(
    predict: Predict,
    schedule: Schedule,
    y: Tensor,
    noise_at: Callable[[int], Tensor],
    *,
    eta: float | None,
    learn_sigma: bool = True,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Walk down the schedule from noise to latents (N, C, H, W) float32 of classes y (N,).

    noise_at(k) is standard normal noise of that shape: k = 0 the start, k = 1, 2, ... the noise of
    each step taken. eta None is the ancestral sampler, a number is DDIM. Latents are not clipped.
    """
    x = noise_at(0)
    for k, i in enumerate(reversed(range(schedule.num_timesteps)), start=1):
        out = predict(x, int(schedule.timesteps[i]), y)
        eps, v = split_output(out, x.shape[1], learn_sigma)
        mean, std = (
            ddpm_step(schedule, x, i, eps, v)
            if eta is None
            else ddim_step(schedule, x, i, eps, eta)
        )
        # The last step adds no noise: it gives the mean of x_0.
        x = mean if i == 0 or eta == 0.0 else mean + std * noise_at(k)
        on_step()
    return x


def ddpm_step(
    schedule: Schedule, x: Tensor, i: int, eps: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(x_{i-1} | x_i); i is a step of the schedule.

    Without a learned variance (v None) it is beta_i. Source: Ho et al. 2020, algorithm 2; Nichol &
    Dhariwal 2021, eq. 15.
    """
    t = torch.full((len(x),), i, device=x.device)
    mean = schedule.posterior_mean(schedule.predict_x_start(x, t, eps), x, t)
    if v is None:
        log_variance = schedule.at("log_betas", t)
    else:
        log_variance = schedule.learned_log_variance(v, t)
    return mean, torch.exp(0.5 * log_variance)


def ddim_step(
    schedule: Schedule, x: Tensor, i: int, eps: Tensor, eta: float
) -> tuple[Tensor, float]:
    """Mean and standard deviation of x_{i-1} under DDIM; eta = 1 has the ancestral posterior's.

    Source: Song et al. 2021, eqs. 12 and 16.
    """
    # Python's float64: in float32, 1 - alphas_cumprod has three digits left near the data.
    now, before = float(schedule.alphas_cumprod[i]), float(schedule.alphas_cumprod_before[i])
    std = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
    x_start = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    return math.sqrt(before) * x_start + math.sqrt(1 - before - std**2) * eps, std
