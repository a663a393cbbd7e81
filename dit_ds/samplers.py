"""Noise to latents: which sampler for which objective, with guidance, in batches.

Image i of a seed is made of the same noise whatever the batch size and the number of ranks: a
rank passes its slice of the classes and the ids of its images.

Sources: those of `ddpm_samplers`, `flow_samplers` and `dpm_solver`; Ho & Salimans 2022
(classifier-free guidance); Kynkäänniemi et al. 2024 (guidance in an interval).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

from dit_ds import ddpm_samplers, dpm_solver, draws, flow_samplers
from dit_ds.batch import Model, Predict
from dit_ds.ddpm import DDPM
from dit_ds.objectives import Objective
from dit_ds.settings import Sampler

OF_DDPM: tuple[Sampler, ...] = ("ddpm", "ddim", "dpm++")
OF_FLOW: tuple[Sampler, ...] = ("euler", "heun", "sde", "dpm++")


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample; raises ValueError for a setting that cannot work.

    sampler: of DDPM "ddpm" (ancestral) and "ddim", of flows "euler", "heun" and "sde", of both
    "dpm++".
    steps: of DDPM's timesteps, evenly strided, or of a flow's time.
    eta: DDIM's noise, 0 (none, deterministic) to 1 (as much as the ancestral posterior).
    cfg_scale: guidance; 1 is off and costs one pass per model call instead of two.
    cfg_channels: how many channels of the prediction are guided; None is all, 3 is what the
    published DiT does. The variance is always the conditional pass's.
    guidance_interval: guide only where lowest <= t / num_timesteps <= highest.
    batch_size: images at once; guided steps run the model on twice as many.
    """

    sampler: Sampler = "ddpm"
    steps: int = 250
    eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: int | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise ValueError(
                f"sampler={self.sampler!r} is unknown; choose one of {', '.join(get_args(Sampler))}"
            )
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; choose e.g. 250")
        if self.sampler == "sde" and self.steps < 2:
            raise ValueError(
                f"steps={self.steps} is too few for sampler=sde, which takes its last one from "
                "where there is hardly any noise; choose at least 2, as a rule 250"
            )
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta={self.eta} is out of range; choose from 0 to 1")
        if self.eta and self.sampler != "ddim":
            raise ValueError(
                f"eta={self.eta} is a setting of DDIM, not of sampler={self.sampler}; leave it "
                "out, or choose sampler=ddim for a model of objective.name=ddpm"
            )
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

    @property
    def num_calls(self) -> int:
        """Model calls that an image takes; a guided one is a call of twice as many images."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps


def default_sampler(objective: Objective) -> Sampler:
    """The plain one, as published with the objective: ancestral sampling, and Euler's steps."""
    return "ddpm" if isinstance(objective, DDPM) else "euler"


def check(
    settings: SamplerSettings, objective: Objective, *, latent_shape: tuple[int, int, int]
) -> None:
    """Raise ValueError where settings do not fit a model; `sample` does it too."""
    name, fitting = ("ddpm", OF_DDPM) if isinstance(objective, DDPM) else ("flow", OF_FLOW)
    if settings.sampler not in fitting:
        raise ValueError(
            f"sampler={settings.sampler} has no meaning for a model of objective.name={name}; "
            f"choose one of {', '.join(fitting)}"
        )
    if isinstance(objective, DDPM):
        most = ddpm_samplers.usable(objective).num_timesteps
        if settings.steps > most:
            raise ValueError(
                f"steps={settings.steps} exceeds the {most} timesteps of the model"
                + (" that hold signal" if most < objective.num_timesteps else "")
                + f"; choose at most {most}"
            )
    if settings.cfg_channels is not None and settings.cfg_channels > latent_shape[0]:
        raise ValueError(
            f"cfg_channels={settings.cfg_channels} exceeds the {latent_shape[0]} channels of the "
            "latents; choose fewer, or None for all"
        )


@torch.no_grad()
def sample(
    model: Model,
    objective: Objective,
    settings: SamplerSettings,
    *,
    classes: Tensor,
    latent_shape: tuple[int, int, int],
    image_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Tensor:
    """One latent for each class: (N, C, H, W) float32 on the CPU.

    model: maps (x, t, y) to what it was trained for under the objective, in any dtype;
    classes: (N,) int64 in 0..null_class, of which the null class asks for no class in particular;
    latent_shape: (C, H, W); image_ids: the number that decides each image's noise, 0..N-1 unless
    given. A progress bar shows on terminals only.
    Raises ValueError where the arguments do not fit each other.
    """
    ids = list(range(len(classes))) if image_ids is None else list(image_ids)
    if len(ids) != len(classes):
        raise ValueError(
            f"image_ids has {len(ids)} entries for {len(classes)} classes; give one id for each"
        )
    null = objective.null_class
    if len(classes) and not (0 <= int(classes.min()) and int(classes.max()) <= null):
        raise ValueError(
            f"classes={sorted(set(classes.tolist()))} must lie in 0..{null - 1}, or be {null} for "
            "no class"
        )
    check(settings, objective, latent_shape=latent_shape)
    denoise = _denoiser(guide(model, objective, settings), objective, settings)
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

            y = classes[rows].to(device)
            latents[rows] = denoise(y, noise_at, on_step=bar.update).cpu()
    return latents


def _denoiser(
    predict: Predict, objective: Objective, settings: SamplerSettings
) -> Callable[..., Tensor]:
    """The sampler, but for classes, noise and what to call after each step."""
    steps = settings.steps
    if settings.sampler == "dpm++":
        return functools.partial(dpm_solver.denoise, predict, objective, steps=steps)
    if isinstance(objective, DDPM):
        eta = settings.eta if settings.sampler == "ddim" else None
        return functools.partial(ddpm_samplers.denoise, predict, objective, steps=steps, eta=eta)
    method = settings.sampler
    assert method != "ddpm" and method != "ddim"  # by `check`
    return functools.partial(flow_samplers.denoise, predict, objective, steps=steps, method=method)


def guide(model: Model, objective: Objective, settings: SamplerSettings) -> Predict:
    """The model under classifier-free guidance. Source: Ho & Salimans 2022, eq. 6.

    Velocities are guided as noise is: at given x_t both are the same but for a factor and a
    constant.
    """
    lowest, highest = settings.guidance_interval

    def predict(x: Tensor, timestep: float, y: Tensor) -> Tensor:
        # int64 of a whole number, float32 of a flow's.
        t = torch.full(y.shape, timestep, device=y.device)
        share = timestep / objective.num_timesteps
        if settings.cfg_scale == 1.0 or not lowest <= share <= highest:
            return model(x, t, y)
        labels = torch.cat([y, torch.full_like(y, objective.null_class)])
        out = model(torch.cat([x, x]), torch.cat([t, t]), labels).float()
        given, free = out.chunk(2)  # each (N, 2C or C, H, W)
        c = x.shape[1] if settings.cfg_channels is None else settings.cfg_channels
        guided = free[:, :c] + settings.cfg_scale * (given[:, :c] - free[:, :c])
        return torch.cat([guided, given[:, c:]], dim=1)

    return predict
