"""What is learned: DDPM with a linear schedule, noise prediction and a learned variance.

`Schedule` holds the closed forms of the diffusion process and serves the samplers too. An
objective takes the model as a callable and the sample's raw draws as they come from the loader; it
draws nothing itself.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models"; Nichol & Dhariwal 2021,
"Improved denoising diffusion probabilistic models"; Peebles & Xie 2023 (the settings).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


class Batch(Protocol):
    """A micro-batch's labels and raw draws, one row for each sample."""

    @property
    def y(self) -> Tensor:
        """(N,) int64 classes."""

    @property
    def time(self) -> Tensor:
        """(N,) float32 uniform in [0, 1), mapped to a timestep."""

    @property
    def drop(self) -> Tensor:
        """(N,) float32 uniform in [0, 1), decides whether the class is dropped."""

    @property
    def noise(self) -> Tensor:
        """(N, C, H, W) float32 standard normal."""


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


def split_output(out: Tensor, num_channels: int, learn_sigma: bool) -> tuple[Tensor, Tensor | None]:
    """The model's noise and, with learn_sigma, its variance: each (N, C, H, W) float32.

    Raises ValueError if the model returns other channels than learn_sigma says.
    """
    expected = 2 * num_channels if learn_sigma else num_channels
    if out.shape[1] != expected:
        raise ValueError(
            f"learn_sigma={learn_sigma} needs a model that returns {expected} channels, this one "
            f"returns {out.shape[1]}; give both the learn_sigma that the model was built with"
        )
    if not learn_sigma:
        return out.float(), None
    eps, v = out.float().chunk(2, dim=1)
    return eps, v


class DDPM:
    """Noise prediction with a learned variance: loss = mse + vb.

    `class_dropout` is the share of samples trained on the null class (= num_classes). Raises
    ValueError for settings out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        class_dropout: float = 0.1,
        num_timesteps: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if not 0.0 <= class_dropout <= 1.0:
            raise ValueError(
                f"class_dropout={class_dropout} is a share; choose from 0 to 1, as a rule 0.1"
            )
        self.null_class = num_classes
        self.class_dropout = class_dropout
        self.learn_sigma = learn_sigma
        self.schedule = Schedule.linear(num_timesteps)

    def loss(self, model: Model, x_start: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Per-sample losses of latents x_start (N, C, H, W) under the batch's raw draws.

        Returns `training_losses` and the timesteps `t`, each (N,). Nothing is averaged, so that
        losses can be weighted and logged by timestep.
        """
        t, y = self._inputs(batch)
        return self.training_losses(model, x_start, t, y, batch.noise) | {"t": t}

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Timesteps and classes, each (N,) int64, that the raw draws mean."""
        num_timesteps = self.schedule.num_timesteps
        # The product may round up to num_timesteps.
        t = (batch.time * num_timesteps).long().clamp(max=num_timesteps - 1)
        return t, torch.where(batch.drop < self.class_dropout, self.null_class, batch.y)

    def probe(self, model: Model, x_start: Tensor, batch: Batch, normals: Tensor) -> Tensor:
        """What to differentiate for an unbiased estimate of the curvature of `loss`, (N,).

        With g the gradient of 2 / M times the sum over samples, of M = samples * C * H * W elements
        in all, (M / 2) g^2 has the mean of the diagonal of the Gauss-Newton matrix of the mean
        loss. normals: (N, output channels, H, W) float32, independent for every element.

        The prediction of noise is a normal of variance 1/2, whose labels Liu et al. 2023 (section
        2.3) would draw; the product with `normals` is that, without what cancels. The predicted
        variance has the Fisher information of a normal's log variance, 1/2; eps is detached there,
        as in the loss, and at t = 0 the binned likelihood counts as the normal that it bins.
        """
        t, y = self._inputs(batch)
        x_t = self.schedule.q_sample(x_start, t, batch.noise)
        eps, v = split_output(model(x_t, t, y), x_t.shape[1], self.learn_sigma)
        if v is None:
            return (eps * normals).flatten(1).sum(1)
        # Weight of the bound in nats, and how far v = -1 to 1 moves the log variance.
        weight = self.schedule.num_timesteps / 1000 / math.log(2.0)
        q = self.schedule
        half_width = (q.at("log_betas", t) - q.at("posterior_log_variance_clipped", t)) / 2
        of_eps, of_v = normals.chunk(2, dim=1)
        return (eps * of_eps + math.sqrt(weight / 4) * half_width * v * of_v).flatten(1).sum(1)

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, y: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """`loss`, `mse` and `vb`, each (N,) float32 whatever the model's dtype.

        x_start, noise: (N, C, H, W) float32; t, y: (N,) int64. mse is the mean over channels and
        pixels, vb the variational bound in bits per dimension times num_timesteps / 1000. The
        bound trains the variance only. Source: Nichol & Dhariwal 2021, eq. 16, with the weight
        1/1000 on a sum over timesteps.
        """
        x_t = self.schedule.q_sample(x_start, t, noise)
        eps, v = split_output(model(x_t, t, y), x_t.shape[1], self.learn_sigma)
        mse = _mean(F.mse_loss(eps, noise, reduction="none"))
        if v is None:
            return {"loss": mse, "mse": mse, "vb": torch.zeros_like(mse)}
        vb = self._vb(x_start, x_t, t, eps.detach(), v) * self.schedule.num_timesteps / 1000
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _vb(self, x_start: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        """One term of the variational bound, (N,) bits per dimension. Source: Ho et al. eq. 5."""
        q = self.schedule
        mean = q.posterior_mean(q.predict_x_start(x_t, t, eps), x_t, t)
        log_variance = q.learned_log_variance(v, t)
        kl = _normal_kl(
            q.posterior_mean(x_start, x_t, t),
            q.at("posterior_log_variance_clipped", t),
            mean,
            log_variance,
        )
        nll = -_discretized_log_likelihood(x_start, mean, log_scale=0.5 * log_variance)
        return torch.where(t == 0, _mean(nll), _mean(kl)) / math.log(2.0)


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the batch: (N, ...) to (N,)."""
    return x.flatten(1).mean(1)


def _normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    ratio = torch.exp(log_var1 - log_var2)
    return 0.5 * (log_var2 - log_var1 - 1.0 + ratio + (mean1 - mean2) ** 2 * torch.exp(-log_var2))


def _normal_cdf(x: Tensor) -> Tensor:
    """Standard normal cumulative distribution in its tanh form, as published results used it."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of x's bin, of width 2/255, under a normal, in nats, elementwise.

    The outermost bins reach to infinity. The bins are those of 8-bit images in [-1, 1]; latents
    keep them, as published. Source: Ho et al. 2020, eq. 13.
    """
    inverse = torch.exp(-log_scale)
    below = _normal_cdf((x - mean + 1.0 / 255.0) * inverse)
    above = _normal_cdf((x - mean - 1.0 / 255.0) * inverse)
    inside = torch.where(x > 0.999, 1.0 - above, below - above)
    return torch.where(x < -0.999, below, inside).clamp(min=1e-12).log()
