"""AdamW and Sophia-G that keep averages of their weights, and the learning rate by the step.

The exponential moving average (EMA) is optimizer state, `state[p]["ema"]`, shaped like the
parameter that the optimizer sees. ZeRO therefore shards it, offloads it and hands it back like the
moments; it lives in float32 whatever the precision of training. So does Sophia's Hessian.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from dit_ds import profiles
from dit_ds.settings import Optimizer

PROFILES = ("ema_short", "ema_long")
"""State of the averages with power-function profiles, where they are kept."""


class Averaging(torch.optim.Optimizer):
    """What our optimizers have in common: the EMA, and at ZeRO stage 0 the clipping.

    The decay at step t (from 1) is min(ema_decay, (1 + t) / (10 + t)), so that the first weights
    are forgotten soon; the average starts from the initial weights. With `ema_lengths` two more
    averages are kept, whose decay is (1 - 1 / t)^(gamma + 1) (see `profiles`). All of it is
    elementwise, so the flat partitions that ZeRO hands over are treated as the parameters
    themselves would be.

    At ZeRO stage 0 the engine calls the optimizer without a wrapper of its own. There, and only
    there, `max_grad_norm` is given: gradients are clipped here, and a step whose gradient is not
    finite is skipped, as the wrappers do (`overflow` and `_global_grad_norm` are what the engine
    reads).

    `vector_state` and `scalar_state` name what the state of a parameter holds, for checkpoints.
    """

    vector_state: tuple[str, ...]
    scalar_state = ("step",)

    def _begin(
        self, *, ema_decay: float, ema_lengths: tuple[float, ...], max_grad_norm: float | None
    ) -> None:
        for group in self.param_groups:
            group["ema_decay"] = ema_decay
            if ema_lengths:
                group["ema_lengths"] = ema_lengths
        self._gammas = dict(zip(PROFILES, map(profiles.exponent, ema_lengths), strict=False))
        self.vector_state = (*self.vector_state, *self._gammas)
        self.max_grad_norm = max_grad_norm
        self.overflow = False
        self._global_grad_norm: torch.Tensor | float = 0.0

    def _with_gradients(self) -> Iterator[tuple[torch.Tensor, dict[str, Any], dict[str, Any]]]:
        """Parameters, with their state (whole from the first time on) and their group."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    for key in self.vector_state:
                        state[key] = torch.zeros_like(p, requires_grad=False)
                    state["ema"].copy_(p.detach())
                yield p, state, group

    def _average(self) -> None:
        for p, state, group in self._with_gradients():
            # `step` may live on the GPU, where reading it would wait for the queue: compute there.
            t = state["step"]
            weight = 1 - torch.clamp((1 + t) / (10 + t), max=group["ema_decay"])
            state["ema"].lerp_(p.detach(), weight)
            for key, gamma in self._gammas.items():
                # 1 - (1 - 1/t)^(gamma + 1), which float32 could not tell from 0 late in a training.
                weight = -torch.expm1((gamma + 1) * torch.log1p(-1 / t))
                state[key].lerp_(p.detach(), weight)

    def _clip(self) -> bool:
        """At stage 0, clip the global gradient norm; False where it is not finite."""
        if self.max_grad_norm is None:
            return True
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


class AdamW(Averaging, torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019) plus the EMA of the weights as state."""

    vector_state = ("exp_avg", "exp_avg_sq", "ema")

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ema_decay: float,
        ema_lengths: tuple[float, ...] = (),
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._begin(ema_decay=ema_decay, ema_lengths=ema_lengths, max_grad_norm=max_grad_norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on `p.grad`, then the average follows."""
        assert closure is None
        if self._clip():
            for _ in self._with_gradients():
                pass  # torch fills an empty state only, so the whole of it is made before
            super().step()
            self._average()


class SophiaG(Averaging):
    """Sophia with the Gauss-Newton-Bartlett estimate of the diagonal Hessian, and the EMA.

    A step, elementwise, from the gradient g and the Hessian's running mean h:

        m = beta1 m + (1 - beta1) g
        p = p - lr weight_decay p - lr clip(m / max(rho h, eps), -1, 1)

    `rho` says how far a coordinate may trust its curvature: where the update is not clipped it is
    lr / rho of Newton's step m / h, which is 0.02 of it with the defaults; where it is clipped, it
    is lr. The smaller rho, the more coordinates are clipped.

    Inside `measuring`, `step` takes `p.grad` for the gradient of a probe instead, and moves only h.

    Source: Liu et al. 2023, "Sophia: A Scalable Stochastic Second-order Optimizer for Language
    Model Pre-training", algorithm 3, whose gamma is rho here. h is not corrected for its beginning
    at zero, there as here, so nearly all of the first updates are clipped.
    """

    vector_state = ("exp_avg", "hessian", "ema")

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.01,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        ema_decay: float = 0.9999,
        ema_lengths: tuple[float, ...] = (),
        max_grad_norm: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._begin(ema_decay=ema_decay, ema_lengths=ema_lengths, max_grad_norm=max_grad_norm)
        self._scale: float | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on `p.grad`, then the average follows; inside `measuring`, see there."""
        assert closure is None
        if self._scale is not None:
            for p, state, group in self._with_gradients():
                beta2 = group["betas"][1]
                h = state["hessian"]
                h.mul_(beta2).addcmul_(p.grad, p.grad, value=(1 - beta2) * self._scale)
        elif self._clip():
            for p, state, group in self._with_gradients():
                state["step"] += 1
                m = state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                trusted = (group["rho"] * state["hessian"]).clamp_(min=group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.div(m, trusted, out=trusted).clamp_(-1, 1), alpha=group["lr"])
            self._average()

    @contextlib.contextmanager
    def measuring(self, scale: float) -> Iterator[None]:
        """Inside, `step` averages scale * p.grad^2 into the Hessian and leaves the rest alone."""
        self._scale = scale
        try:
            yield
        finally:
            self._scale = None


def build(
    params: Iterable[torch.nn.Parameter],
    settings: Optimizer,
    *,
    zero_stage: int,
    ema_lengths: tuple[float, ...] = (),
) -> AdamW | SophiaG:
    """The optimizer of a configuration, to be handed to `deepspeed.initialize`.

    ema_lengths: of the two averages that are kept beside the plain one, or none.
    """
    shared = common(settings, zero_stage=zero_stage, ema_lengths=ema_lengths)
    if settings.name == "sophiag":
        assert settings.rho is not None
        return SophiaG(params, rho=settings.rho, **shared)
    return AdamW(params, **shared)


def common(
    settings: Optimizer, *, zero_stage: int, ema_lengths: tuple[float, ...]
) -> dict[str, Any]:
    """What every optimizer takes from a configuration."""
    return {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "ema_decay": settings.ema_decay,
        "ema_lengths": ema_lengths,
        "max_grad_norm": settings.gradient_clipping if zero_stage == 0 else None,
    }


def learning_rate(settings: Optimizer, step: int, *, num_steps: int) -> float:
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
