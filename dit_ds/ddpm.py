"""What is learned: DDPM, as published (noise and a learned variance) and its variants.

The objective takes the model as a callable and the sample's raw draws as they come from the loader;
it draws nothing itself.

Sources: Ho et al. 2020, "Denoising diffusion probabilistic models"; Nichol & Dhariwal 2021,
"Improved denoising diffusion probabilistic models"; Peebles & Xie 2023 (the settings); Salimans &
Ho 2022, "Progressive distillation for fast sampling of diffusion models" (v-prediction); Hang et
al. 2023, "Efficient diffusion training via min-SNR weighting strategy".
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ds.batch import Batch, Model, check, classes, sample_mean
from dit_ds.schedule import Schedule


def split_output(out: Tensor, num_channels: int, learn_sigma: bool) -> tuple[Tensor, Tensor | None]:
    """The model's prediction and, with learn_sigma, its variance: each (N, C, H, W) float32.

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
    prediction, v = out.float().chunk(2, dim=1)
    return prediction, v


class DDPM:
    """Prediction of the noise, or of the velocity, with a learned variance: loss = mse + vb.

    Args:
        num_classes: of the data; the class after the last is the null class.
        class_dropout: the share of samples trained on the null class.
        num_timesteps: of the schedule.
        learn_sigma: whether the model also returns the variance of each step.
        schedule: of the noise.
        prediction: "eps", the noise, or "v", the velocity sqrt(a) eps - sqrt(1 - a) x_0.
        min_snr_gamma: weighs the mse by min(SNR, gamma) / SNR, for "v" by min(SNR, gamma) / (SNR +
            1), which both are min(SNR, gamma) on the error of x_0; None weighs all alike.

    Raises:
        ValueError: a setting is out of range.
    """

    losses = "loss", "mse", "vb"
    """What `loss` gives beside the timesteps."""

    def __init__(
        self,
        num_classes: int,
        *,
        class_dropout: float = 0.1,
        num_timesteps: int = 1000,
        learn_sigma: bool = True,
        schedule: Literal["linear", "cosine"] = "linear",
        prediction: Literal["eps", "v"] = "eps",
        min_snr_gamma: float | None = None,
    ) -> None:
        check(num_classes=num_classes, class_dropout=class_dropout)
        self.null_class = num_classes
        self.class_dropout = class_dropout
        self.learn_sigma = learn_sigma
        self.prediction = prediction
        self.schedule_name = schedule
        make = {"linear": Schedule.linear, "cosine": Schedule.cosine}[schedule]
        self.schedule = make(num_timesteps)
        self.weights: Tensor | None = None  # (num_timesteps,) of the mse
        if min_snr_gamma is not None:
            signal = self.schedule.alphas_cumprod
            snr = signal / (1.0 - signal)
            weights = np.minimum(snr, min_snr_gamma) / (snr if prediction == "eps" else snr + 1.0)
            self.weights = torch.from_numpy(weights).float()

    @property
    def num_timesteps(self) -> int:
        """Timesteps are 0 to num_timesteps - 1."""
        return self.schedule.num_timesteps

    def loss(self, model: Model, x_start: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Per-sample losses of latents x_start (N, C, H, W) under the batch's raw draws.

        Returns `training_losses` and the timesteps `t`, each (N,). Nothing is averaged, so that
        losses can be weighted and logged by timestep.
        """
        t, y = self._inputs(batch)
        return self.training_losses(model, x_start, t, y, batch.noise) | {"t": t}

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Timesteps and classes, each (N,) int64, that the raw draws mean."""
        # The product may round up to num_timesteps.
        t = (batch.time * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        return t, classes(batch, null_class=self.null_class, dropout=self.class_dropout)

    def eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise in x_t that the model's prediction means, (N, C, H, W); t: (N,) int64."""
        if self.prediction == "eps":
            return prediction
        return self.schedule.eps_of_velocity(x_t, t, prediction)

    def probe(self, model: Model, x_start: Tensor, batch: Batch, normals: Tensor) -> Tensor:
        """What to differentiate for an unbiased estimate of the curvature of `loss`, (N,).

        With g the gradient of 2 / M times the sum over samples, of M = samples * C * H * W elements
        in all, (M / 2) g^2 has the mean of the diagonal of the Gauss-Newton matrix of the mean
        loss. normals: (N, output channels, H, W) float32, independent for every element.

        The prediction of noise is a normal of variance 1/2, whose labels Liu et al. 2023 (section
        2.3) would draw; the product with `normals` is that, without what cancels. The predicted
        variance has the Fisher information of a normal's log variance, 1/2; eps is detached there,
        as in the loss, and at t = 0 the binned likelihood counts as the normal that it bins. A
        weight of the mse is one of the squared gradient.
        """
        t, y = self._inputs(batch)
        x_t = self.schedule.q_sample(x_start, t, batch.noise)
        prediction, v = split_output(model(x_t, t, y), x_t.shape[1], self.learn_sigma)
        if self.weights is not None:
            prediction = prediction * self._weights(t).sqrt().view(-1, 1, 1, 1)
        if v is None:
            return (prediction * normals).flatten(1).sum(1)
        # Weight of the bound in nats, and how far v = -1 to 1 moves the log variance.
        weight = self.num_timesteps / 1000 / math.log(2.0)
        q = self.schedule
        half_width = (q.at("log_betas", t) - q.at("posterior_log_variance_clipped", t)) / 2
        of_mean, of_v = normals.chunk(2, dim=1)
        of_v = math.sqrt(weight / 4) * half_width * of_v
        return (prediction * of_mean + v * of_v).flatten(1).sum(1)

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, y: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """`loss`, `mse` and `vb`, each (N,) float32 whatever the model's dtype.

        x_start, noise: (N, C, H, W) float32; t, y: (N,) int64. mse is the mean over channels and
        pixels, before its weight; vb the variational bound in bits per dimension times
        num_timesteps / 1000. The bound trains the variance only. Source: Nichol & Dhariwal 2021,
        eq. 16, with the weight 1/1000 on a sum over timesteps.
        """
        x_t = self.schedule.q_sample(x_start, t, noise)
        prediction, v = split_output(model(x_t, t, y), x_t.shape[1], self.learn_sigma)
        target = noise if self.prediction == "eps" else self.schedule.velocity(x_start, t, noise)
        mse = sample_mean(F.mse_loss(prediction, target, reduction="none"))
        weighted = mse if self.weights is None else mse * self._weights(t)
        if v is None:
            return {"loss": weighted, "mse": mse, "vb": torch.zeros_like(mse)}
        eps = self.eps(prediction.detach(), x_t, t)
        vb = self._vb(x_start, x_t, t, eps, v) * self.num_timesteps / 1000
        return {"loss": weighted + vb, "mse": mse, "vb": vb}

    def _weights(self, t: Tensor) -> Tensor:
        """(N,) weights of the mse at t; the table is moved to the device once."""
        assert self.weights is not None
        self.weights = self.weights.to(t.device)
        return self.weights[t]

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
        return torch.where(t == 0, sample_mean(nll), sample_mean(kl)) / math.log(2.0)


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
