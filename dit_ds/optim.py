"""AdamW that keeps an average of its weights, and the learning rate as a function of the step.

The exponential moving average (EMA) is optimizer state, `state[p]["ema"]`, shaped like the
parameter that the optimizer sees. ZeRO therefore shards it, offloads it and hands it back like the
moments; it lives in float32 whatever the precision of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dit_ds import config


class AdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019) plus the EMA of the weights as state.

    The decay at step t (from 1) is min(ema_decay, (1 + t) / (10 + t)), so that the first weights
    are forgotten soon; the average starts from the initial weights. Elementwise, so the flat
    partitions that ZeRO hands over are treated as the parameters themselves would be.

    At ZeRO stage 0 the engine calls this optimizer without a wrapper of its own. There, and only
    there, `max_grad_norm` is given: gradients are clipped here, and a step whose gradient is not
    finite is skipped, as the wrappers do (`overflow` and `_global_grad_norm` are what the engine
    reads).

    `vector_state` and `scalar_state` name what the state of a parameter holds, for checkpoints.
    """

    vector_state = ("exp_avg", "exp_avg_sq", "ema")
    scalar_state = ("step",)

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ema_decay: float,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group["ema_decay"] = ema_decay
        self.max_grad_norm = max_grad_norm
        self.overflow = False
        self._global_grad_norm: torch.Tensor | float = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on `p.grad`, then the average follows."""
        assert closure is None
        if self.max_grad_norm is not None and not self._clip():
            return
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in params:
            if "ema" not in self.state[p]:
                # torch fills an empty state only, so the whole of it is made here.
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                    ema=p.detach().clone(),
                )
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._average(p, self.state[p], group["ema_decay"])

    @staticmethod
    def _average(p: torch.Tensor, state: dict[str, torch.Tensor], decay: float) -> None:
        # `step` may live on the GPU, where reading it would wait for the queue: compute there.
        t = state["step"]
        weight = 1 - torch.clamp((1 + t) / (10 + t), max=decay)
        state["ema"].lerp_(p.detach(), weight)

    def _clip(self) -> bool:
        """Clip the global gradient norm; False where it is not finite."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            self._global_grad_norm = float("inf")
            return False
        if self.max_grad_norm:
            scale = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(grads, scale)
        return True


def build(
    params: Iterable[torch.nn.Parameter], settings: config.Optimizer, *, zero_stage: int
) -> AdamW:
    """The optimizer of a configuration, to be handed to `deepspeed.initialize`."""
    return AdamW(
        params,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        ema_decay=settings.ema_decay,
        max_grad_norm=settings.gradient_clipping if zero_stage == 0 else None,
    )


def learning_rate(settings: config.Optimizer, step: int, *, num_steps: int) -> float:
    """Learning rate of step `step` (from 0) of a run of `num_steps`.

    Linear from lr / warmup_steps to lr over the warm-up; then lr, or half a cosine down to zero.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / (num_steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` for all groups from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
