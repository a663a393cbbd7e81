"""The diffusion process in discrete time: its schedule of noise and the closed forms that follow.

Serves the objective and the samplers.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models"; Nichol & Dhariwal 2021,
"Improved denoising diffusion probabilistic models"; Salimans & Ho 2022, "Progressive distillation
for fast sampling of diffusion models" (v-prediction).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class Schedule:
    """The forward process q and its posterior at `num_timesteps` steps of decreasing signal.

    `alphas_cumprod`: (T,) float64; `timesteps`: (T,) int64, the number by which the model knows
    each step. Tables are computed in float64 and handed out as float32.
    """

    def __init__(self, alphas_cumprod: np.ndarray, timesteps: np.ndarray) -> None:
        before = np.append(1.0, alphas_cumprod[:-1])
        self.timesteps = timesteps
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_before = before
        self.betas = 1.0 - alphas_cumprod / before
        self.log_betas = np.log(self.betas)
        self.sqrt_alphas_cumprod = np.sqrt(alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - alphas_cumprod)
        self.posterior_mean_x_start = self.betas * np.sqrt(before) / (1.0 - alphas_cumprod)
        self.posterior_mean_x_t = (
            np.sqrt(1.0 - self.betas) * (1.0 - before) / (1.0 - alphas_cumprod)
        )
        variance = self.betas * (1.0 - before) / (1.0 - alphas_cumprod)
        # At the first step the posterior has no variance; its logarithm borrows the second step's.
        variance[0] = variance[1] if len(variance) > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(variance)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def linear(cls, num_timesteps: int = 1000) -> Schedule:
        """Betas rise linearly from 1e-4 to 0.02 over 1000 steps. Source: Ho et al. 2020, 4.

        Fewer or more steps scale the betas, so that the last step keeps as little signal.
        """
        if num_timesteps <= 20:
            raise ValueError(
                f"num_timesteps={num_timesteps} makes betas of 1 or more; choose more than 20, "
                "as a rule 1000"
            )
        scale = 1000 / num_timesteps
        betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
        return cls(np.cumprod(1.0 - betas), np.arange(num_timesteps))

    @classmethod
    def cosine(cls, num_timesteps: int = 1000) -> Schedule:
        """Signal falls along a squared cosine. Source: Nichol & Dhariwal 2021, eq. 17.

        Betas are at most 0.999, as there.
        """
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps={num_timesteps} must be at least 2, as a rule 1000")
        time = np.linspace(0.0, 1.0, num_timesteps + 1, dtype=np.float64)
        signal = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1.0 - signal[1:] / signal[:-1], 0.999)
        return cls(np.cumprod(1.0 - betas), np.arange(num_timesteps))

    @property
    def num_timesteps(self) -> int:
        """Number of steps of this schedule."""
        return len(self.betas)

    def respaced(self, num_steps: int) -> Schedule:
        """This process seen at `num_steps` of its steps, evenly strided, first and last included.

        Source: Nichol & Dhariwal 2021, section 4.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"steps={num_steps} must be from 1 to {self.num_timesteps}")
        stride = (self.num_timesteps - 1) / max(num_steps - 1, 1)
        # A running sum and not i * stride: at ties its rounding decides, and it chose the
        # timesteps of the published results.
        position = np.cumsum(np.append(0.0, np.full(num_steps - 1, stride)))
        kept = np.round(position).astype(np.int64)
        return Schedule(self.alphas_cumprod[kept], self.timesteps[kept])

    def at(self, name: str, t: Tensor) -> Tensor:
        """Entries t (N,) of the table `name`, as float32 (N, 1, 1, 1) on t's device."""
        key = (name, t.device)
        if key not in self._on_device:  # moved once: a copy in each step would wait for the GPU
            self._on_device[key] = torch.from_numpy(getattr(self, name)).float().to(t.device)
        return self._on_device[key][t].view(-1, 1, 1, 1)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) for given noise, (N, C, H, W). Source: Ho et al. 2020, eq. 4."""
        return (
            self.at("sqrt_alphas_cumprod", t) * x_start
            + self.at("sqrt_one_minus_alphas_cumprod", t) * noise
        )

    def predict_x_start(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 that x_t came from if its noise was eps, (N, C, H, W); inverts `q_sample`."""
        return (x_t - self.at("sqrt_one_minus_alphas_cumprod", t) * eps) / self.at(
            "sqrt_alphas_cumprod", t
        )

    def velocity(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What v-prediction predicts, (N, C, H, W). Source: Salimans & Ho 2022, appendix D."""
        return (
            self.at("sqrt_alphas_cumprod", t) * noise
            - self.at("sqrt_one_minus_alphas_cumprod", t) * x_start
        )

    def eps_of_velocity(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The noise in x_t whose velocity is v, (N, C, H, W)."""
        return (
            self.at("sqrt_alphas_cumprod", t) * v
            + self.at("sqrt_one_minus_alphas_cumprod", t) * x_t
        )

    def posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), (N, C, H, W). Source: Ho et al. 2020, eq. 7."""
        return (
            self.at("posterior_mean_x_start", t) * x_start + self.at("posterior_mean_x_t", t) * x_t
        )

    def learned_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """Log variance of p(x_{t-1} | x_t) from v: -1 is the posterior's, 1 is beta_t.

        v: (N, C, H, W). Source: Nichol & Dhariwal 2021, eq. 15.
        """
        share = (v + 1) / 2
        low, high = self.at("posterior_log_variance_clipped", t), self.at("log_betas", t)
        return share * high + (1 - share) * low
