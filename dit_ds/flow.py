"""What is learned: flow matching, the velocity of straight paths between data and noise.

A latent at time t is x_t = (1 - t) x_0 + t noise, from the data at t = 0 to noise at t = 1, and the
model predicts its velocity, noise - x_0. It is given t * num_timesteps, since its embedding's
frequencies are made for numbers up to 1000.

Sources: Lipman et al. 2023, "Flow matching for generative modeling"; Liu et al. 2023, "Flow
straight and fast" (the path); Ma et al. 2024, "SiT"; Esser et al. 2024, "Scaling rectified flow
transformers for high-resolution image synthesis" (which times are trained, and the shift).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_ds.batch import Batch, Model, check, classes, sample_mean


class FlowMatching:
    """Prediction of the velocity: loss = mse.

    Args:
        num_classes: of the data; the class after the last is the null class.
        class_dropout: the share of samples trained on the null class.
        num_timesteps: what t = 1 is told the model as.
        time: how often each time is trained: "uniform"; "logit-normal", the sigmoid of a normal of
            logit_mean and logit_std; "cosmap", as often as a cosine schedule has its
            signal-to-noise ratio. Source: Esser et al. 2024, section 3.1.
        shift: moves times towards noise where it is above 1, in training and sampling, since many
            pixels need more noise to be hidden. Source: Esser et al. 2024, eq. 23.

    Raises:
        ValueError: a setting is out of range.
    """

    losses = "loss", "mse"
    """What `loss` gives beside the timesteps."""
    learn_sigma = False
    """There is no variance to learn."""

    def __init__(
        self,
        num_classes: int,
        *,
        class_dropout: float = 0.1,
        num_timesteps: int = 1000,
        time: Literal["uniform", "logit-normal", "cosmap"] = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        shift: float = 1.0,
    ) -> None:
        check(num_classes=num_classes, class_dropout=class_dropout)
        for name, value in (("logit_std", logit_std), ("shift", shift)):
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name}={value} must be above 0; leave it out for 1")
        self.null_class = num_classes
        self.class_dropout = class_dropout
        self.num_timesteps = num_timesteps
        self.time, self.logit_mean, self.logit_std = time, logit_mean, logit_std
        self.shift = shift

    def shifted(self, t: Tensor) -> Tensor:
        """Times in [0, 1] moved towards noise; 0 and 1 stay. Source: Esser et al. 2024, eq. 23."""
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def times(self, uniform: Tensor) -> Tensor:
        """(N,) float32 times in [0, 1] of raw uniforms (N,) in [0, 1)."""
        t = uniform
        if self.time == "logit-normal":
            # A uniform of 0 is a normal of -infinity, and so the time 0.
            normal = torch.special.ndtri(uniform.double())
            t = torch.sigmoid(self.logit_mean + self.logit_std * normal).float()
        elif self.time == "cosmap":
            tangent = torch.tan(uniform.double() * (math.pi / 2))
            t = (tangent / (1.0 + tangent)).float()
        return self.shifted(t)

    def _inputs(self, x_start: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x_t (N, C, H, W), the numbers by which the model knows t (N,), and classes (N,)."""
        t = self.times(batch.time)
        at = t.view(-1, 1, 1, 1)
        x_t = (1.0 - at) * x_start + at * batch.noise
        y = classes(batch, null_class=self.null_class, dropout=self.class_dropout)
        return x_t, t * self.num_timesteps, y

    def loss(self, model: Model, x_start: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Per-sample losses of latents x_start (N, C, H, W) under the batch's raw draws.

        Returns `loss` and `mse`, the mean over channels and pixels, and `t` in [0, num_timesteps],
        each (N,) float32 whatever the model's dtype.
        """
        x_t, t, y = self._inputs(x_start, batch)
        v = velocity(model(x_t, t, y), x_t)
        target = batch.noise - x_start
        mse = sample_mean(F.mse_loss(v, target, reduction="none"))
        return {"loss": mse, "mse": mse, "t": t}

    def probe(self, model: Model, x_start: Tensor, batch: Batch, normals: Tensor) -> Tensor:
        """What to differentiate for an unbiased estimate of the curvature of `loss`, (N,).

        As `ddpm.DDPM.probe`, of which this is the part of the prediction.
        """
        x_t, t, y = self._inputs(x_start, batch)
        return (velocity(model(x_t, t, y), x_t) * normals).flatten(1).sum(1)


def velocity(out: Tensor, x_t: Tensor) -> Tensor:
    """The model's output as float32; ValueError if it has not the channels of x_t."""
    if out.shape != x_t.shape:
        raise ValueError(
            f"flow matching needs a model that returns {x_t.shape[1]} channels, this one returns "
            f"{out.shape[1]}; build it with learn_sigma=False"
        )
    return out.float()
