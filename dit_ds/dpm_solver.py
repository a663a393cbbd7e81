"""Noise to latents in few steps: DPM-Solver++ of second order, multistep, as diffusers has it.

One model call a step: each step also uses the prediction of the step before. The last step gives
the predicted data.

Sources: Lu et al. 2022, "DPM-Solver++: Fast solver for guided sampling of diffusion probabilistic
models", algorithm 2, through `diffusers.DPMSolverMultistepScheduler`; Lin et al. 2024, "Common
diffusion noise schedules and sample steps are flawed", table 2 (which timesteps: "trailing").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dit_ds import ddpm_samplers, flow_samplers
from dit_ds.batch import Predict
from dit_ds.ddpm import DDPM, split_output
from dit_ds.flow import FlowMatching, velocity


def denoise(
    predict: Predict,
    objective: DDPM | FlowMatching,
    y: Tensor,
    noise_at: Callable[[int], Tensor],
    *,
    steps: int,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Walk from noise, noise_at(0), to latents (N, C, H, W) float32 of classes y (N,).

    predict: as `ddpm_samplers.denoise` or `flow_samplers.denoise` ask for. Deterministic.
    """
    from diffusers import DPMSolverMultistepScheduler  # imports slowly, and few need it

    x = noise_at(0)
    timesteps: list[float]
    if isinstance(objective, DDPM):
        schedule = ddpm_samplers.usable(objective)
        # The last step starts well above t = 0, unlike DDIM's: the noise falls so fast down there
        # that a step of second order, which extrapolates, would leap too far.
        kept = np.round(schedule.num_timesteps * (1.0 - np.arange(steps) / steps)).astype(int) - 1
        timesteps = schedule.timesteps[kept].tolist()
        signal = schedule.alphas_cumprod[kept]
        sigmas = np.append(np.sqrt((1.0 - signal) / signal), 0.0)
        kind = {"eps": "epsilon", "v": "v_prediction"}[objective.prediction]
    else:
        sigmas = np.array(flow_samplers.times(objective, steps))
        timesteps = (sigmas[:-1] * objective.num_timesteps).tolist()
        kind = "flow_prediction"
    solver = DPMSolverMultistepScheduler(
        prediction_type=kind, use_flow_sigmas=kind == "flow_prediction", final_sigmas_type="zero"
    )
    solver.set_timesteps(steps)
    solver.set_begin_index(0)
    # The scheduler's own levels of noise are computed in float32, which leaves four digits of the
    # least, and its flows start from a little less than pure noise. These are ours, in float64.
    solver.sigmas = torch.from_numpy(sigmas)
    for t in timesteps:
        out = predict(x, t, y)
        if isinstance(objective, DDPM):
            # The variance goes here: the scheduler would keep three channels and no more.
            out, _ = split_output(out, x.shape[1], objective.learn_sigma)
        else:
            out = velocity(out, x)
        x = solver.step(out, t, x, return_dict=False)[0]
        on_step()
    return x
