"""Data that is one Gaussian, for which what a model should predict is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_ds.batch import Model
from dit_ds.ddpm import DDPM
from dit_ds.objectives import Objective

SHAPE = (1, 8, 8)


@dataclass
class Draws:
    """A batch of raw draws."""

    y: Tensor
    time: Tensor
    drop: Tensor
    noise: Tensor


def draws(num: int, *, seed: int = 0) -> Draws:
    """(num,) samples with times that are evenly spread."""
    generator = torch.Generator().manual_seed(seed)
    return Draws(
        y=torch.zeros(num, dtype=torch.int64),
        time=(torch.arange(num) + 0.5) / num,
        drop=torch.ones(num),
        noise=torch.randn(num, *SHAPE, generator=generator),
    )


@dataclass(frozen=True)
class Gaussian:
    """x_0 ~ N(mean, std^2) in every pixel."""

    mean: float
    std: float

    def sample(self, batch: Draws) -> Tensor:
        """Data of the batch, which does not depend on its noise."""
        generator = torch.Generator().manual_seed(4711)
        return self.mean + self.std * torch.randn(batch.noise.shape, generator=generator)

    def x_start(self, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """E[x_0 | x_t] where x_t = signal x_0 + noise eps."""
        variance = signal**2 * self.std**2 + noise**2
        gain = signal * self.std**2 / variance
        return self.mean + gain * (x_t - signal * self.mean)

    def eps(self, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """E[eps | x_t] where x_t = signal x_0 + noise eps."""
        variance = signal**2 * self.std**2 + noise**2
        return noise / variance * (x_t - signal * self.mean)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[eps - x_0 | x_t] where x_t = (1 - t) x_0 + t eps."""
        return self.eps(x_t, 1 - t, t) - self.x_start(x_t, 1 - t, t)

    def model(self, objective: Objective) -> Model:
        """What a model without a learned variance should predict under the objective."""

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if not isinstance(objective, DDPM):
                return self.velocity(x, (t / objective.num_timesteps).view(-1, 1, 1, 1))
            alpha_cumprod = torch.from_numpy(objective.schedule.alphas_cumprod)[t].view(-1, 1, 1, 1)
            signal, noise = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
            eps = self.eps(x.double(), signal, noise)
            if objective.prediction == "v":
                eps = signal * eps - noise * self.x_start(x.double(), signal, noise)
            return eps.float()

        return predict
