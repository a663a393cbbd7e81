"""Noise to latents by a flow: Euler and Heun for its ODE, and the SDE sampler of SiT.

Times fall from 1, noise, to 0, data, evenly but for the objective's shift. The model is never
asked at t = 0, which logit-normal times do not train.

Sources: Ma et al. 2024, "SiT: Exploring flow and diffusion-based generative models with scalable
interpolant transformers" (the SDE); Karras et al. 2022, "Elucidating the design space of
diffusion-based generative models", algorithm 1 (Heun, with a last step that is Euler's).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit_ds.batch import Predict
from dit_ds.flow import FlowMatching, velocity

Method = Literal["euler", "heun", "sde"]

_LAST_STEP = 0.04
"""Of the SDE, before the shift: where its last step starts, as in SiT's own sampler."""


def times(flow: FlowMatching, steps: int, method: Method = "euler") -> list[float]:
    """`steps` + 1 times from 1 to 0, moved by the objective's shift."""
    last = _LAST_STEP if method == "sde" else 1.0 / steps
    even = np.append(np.linspace(1.0, last, steps), 0.0)
    return flow.shifted(torch.from_numpy(even)).tolist()


def denoise(
    predict: Predict,
    flow: FlowMatching,
    y: Tensor,
    noise_at: Callable[[int], Tensor],
    *,
    method: Method,
    steps: int,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Walk from noise to latents (N, C, H, W) float32 of classes y (N,).

    predict: (x, t * num_timesteps, y) to the velocity. noise_at(k) is standard normal noise of the
    latents' shape: k = 0 the start, k = 1, 2, ... of each step, of the SDE only. The model is
    called once a step, by Heun twice but for the last step.

    Each method has its step from t to s. "euler": x - (t - s) v. "heun": the mean of v at t and of
    v where Euler's step leads. "sde": Euler and Maruyama's step of dx = (v - w/2 score) dt + w^1/2
    dW backwards, which has the same distribution at every time for any w; score = -(x + (1 - t) v)
    / t, and w = 2 t as in SiT's own sampler (its diffusion "sigma", the default). There the last
    step, from 0.04, adds no noise.
    """
    x = noise_at(0)
    grid = itertools.pairwise(times(flow, steps, method))
    for k, (t, s) in enumerate(grid, start=1):
        v = velocity(predict(x, t * flow.num_timesteps, y), x)
        if method == "sde":
            # t * score, which stays finite as t goes to 0.
            score = -(x + (1.0 - t) * v)
            x = x - (t - s) * (v - score)
            if s > 0.0:
                x = x + math.sqrt(2.0 * t * (t - s)) * noise_at(k)
        elif method == "heun" and s > 0.0:
            ahead = velocity(predict(x - (t - s) * v, s * flow.num_timesteps, y), x)
            x = x - (t - s) / 2.0 * (v + ahead)
        else:
            x = x - (t - s) * v
        on_step()
    return x
