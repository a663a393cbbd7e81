"""The curvature that Sophia-G divides by: one extra backward pass, beside the steps of training.

Every `optimizer.hessian_every` steps the first micro-batch of the step is passed through the model
once more, with the probe of the objective in place of the loss. Its gradient is averaged over the
ranks as those of the loss are, and its square is an unbiased estimate of the diagonal of the
Gauss-Newton matrix of the mean loss, which the optimizer averages over time. Nothing else of the
training is touched.

Source: Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dit_ds import distributed, draws, optim, zero
from dit_ds.samples import MicroBatch

Probe = Callable[[Any, MicroBatch, torch.Tensor], torch.Tensor]


class Curvature:
    """Estimates for the Sophia-G of an engine, every `every` steps.

    seed: of the run. probe(model, micro-batch, normals): what to differentiate, (N,), as
    `ddpm.DDPM.probe` describes it. channels: of the model's output.
    """

    def __init__(self, engine: Any, *, every: int, seed: int, probe: Probe, channels: int) -> None:
        self._engine, self._every, self._seed = engine, every, seed
        self._probe, self._channels = probe, channels

    def due(self, step: int) -> bool:
        """Whether to estimate before this step (from 0)."""
        return step % self._every == 0

    def estimate(self, micro: MicroBatch) -> None:
        """Average an estimate on these samples into the Hessian; a collective.

        micro: this rank's samples, as the loader gives them; those of all ranks are the estimate's.
        """
        shape = (self._channels, *micro.noise.shape[2:])
        ids, epochs, device = micro.ids.numpy(), micro.epochs.numpy(), distributed.device()
        normals = torch.from_numpy(draws.normal(self._seed, "curvature", epochs, ids, shape))
        num_samples = distributed.reduce_sum(micro.weight.sum()).item()
        micro = micro.to(device)
        probes = self._probe(self._engine, micro, normals.to(device, non_blocking=True))  # (N,)
        num_elements = num_samples * micro.noise[0].numel()
        # DeepSpeed averages over ranks; the estimate is the sum over them.
        share = distributed.world_size() * 2 / num_elements
        optimizer = zero.client_optimizer(self._engine)
        assert isinstance(optimizer, optim.SophiaG)
        with optimizer.measuring(num_elements / 2):
            zero.step_aside(self._engine, (probes * micro.weight).sum() * share)

    def scalars(self) -> dict[str, float]:
        """`hessian_norm`, and the share of coordinates whose update was clipped; a collective."""
        optimizer: Any = zero.client_optimizer(self._engine)
        (group,) = optimizer.param_groups
        sums = torch.zeros(3, dtype=torch.float64)
        for flat in zero.flats(self._engine):
            state = optimizer.state[flat.tensor]
            for f in flat.written if state else ():
                m, h = (state[k].view(-1)[f.start : f.start + f.length] for k in _KEYS)
                clipped = m.abs() >= (group["rho"] * h).clamp(min=group["eps"])
                found = (clipped.sum(), h.square().sum(), h.new_tensor(f.length))
                sums += torch.stack([v.double() for v in found]).cpu()
        clipped, squares, count = distributed.reduce_sum(sums).tolist()
        return {"hessian_norm": math.sqrt(squares), "clipped_share": clipped / max(count, 1.0)}


_KEYS = ("exp_avg", "hessian")
