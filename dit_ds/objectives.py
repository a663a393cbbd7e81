"""What is learned, out of the settings: `ddpm.DDPM` or `flow.FlowMatching`."""

from __future__ import annotations

import math

from dit_ds import settings
from dit_ds.ddpm import DDPM
from dit_ds.flow import FlowMatching

Objective = DDPM | FlowMatching

_BASE_SIDE = 32  # of the latents of images at 256 x 256, at which nothing is shifted


def build(
    objective: settings.Objective,
    *,
    num_classes: int,
    learn_sigma: bool,
    latent_shape: tuple[int, int, int],
) -> Objective:
    """The objective for latents of (C, H, W), by a model with or without a variance.

    Raises:
        ValueError: settings are out of range, or do not fit the model.
    """
    if objective.name == "ddpm":
        return DDPM(
            num_classes,
            class_dropout=objective.class_dropout,
            num_timesteps=objective.num_timesteps,
            learn_sigma=learn_sigma,
            schedule=objective.schedule or "linear",
            prediction=objective.prediction or "eps",
            min_snr_gamma=objective.min_snr_gamma,
        )
    if learn_sigma:
        raise ValueError(
            "model.learn_sigma=True has no meaning for objective.name=flow; set it to false"
        )
    _, height, width = latent_shape
    shift = objective.shift
    return FlowMatching(
        num_classes,
        class_dropout=objective.class_dropout,
        num_timesteps=objective.num_timesteps,
        time=objective.time or "uniform",
        logit_mean=objective.logit_mean or 0.0,
        logit_std=objective.logit_std or 1.0,
        shift=math.sqrt(height * width) / _BASE_SIDE if shift == "resolution" else shift or 1.0,
    )
