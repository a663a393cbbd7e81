"""Muon for the matrices of the blocks, AdamW for all else, on the partitions that ZeRO hands over.

Muon makes each matrix's momentum orthogonal before it steps along it, so it needs the matrix whole,
where ZeRO hands over flat pieces. The momentum itself is elementwise: it stays cut up as AdamW's
is, and is checkpointed and resharded with it. For a step, the pieces of each matrix that no rank
holds whole travel to one rank, are made orthogonal there, and travel back. Nothing is summed on
the way, so the numbers depend neither on the stage nor on how many ranks there are.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the length
of a step is that of Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2, so that one
learning rate and weight decay suits both kinds of parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from dit_ds import distributed, optim, zero
from dit_ds.optim import Averaging
from dit_ds.settings import Optimizer

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Who makes which matrix of a flat tensor orthogonal.

    here: what this rank holds whole. sent: its pieces of the others, by the rank that does them.
    received: the pieces that it does, by the rank that holds them. shared: whether any rank
    sends; if so, all take part.
    """

    here: list[zero.Fragment]
    sent: list[list[zero.Fragment]]
    received: list[list[zero.Fragment]]
    shared: bool


class Muon(Averaging, torch.optim.AdamW):
    """Both, and the averages of the weights as state.

    A step of a matrix W (rows, columns), from its gradient G and momentum M:

        M = momentum M + G
        W = W - lr weight_decay W - lr 0.2 max(rows, columns)^0.5 orthogonal(G + momentum M)

    M is `exp_avg` of the state; `exp_avg_sq` stays zero for matrices, as the state of all
    parameters has one form.

    Args:
        matrices: what Muon trains.
        others: what AdamW trains.
        lr: of both, as are weight_decay and what is averaged.
        momentum: of the matrices.
        betas: of the others, as eps is.
    """

    vector_state = ("exp_avg", "exp_avg_sq", "ema")

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ema_decay: float,
        ema_lengths: tuple[float, ...] = (),
        max_grad_norm: float | None = None,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "momentum": momentum},
            {"params": list(others)},
        ]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._begin(ema_decay=ema_decay, ema_lengths=ema_lengths, max_grad_norm=max_grad_norm)
        self._plans: dict[torch.Tensor, _Plan] = {}
        self._shapes: dict[str, Shape] = {}

    def attach(self, engine: Any) -> None:
        """Learn which rank holds which piece of which matrix; before the first step, a collective.

        engine: the DeepSpeed engine of this optimizer.
        """
        if engine.zero_optimization_stage() == 0:
            return  # parameters are whole
        shapes = zero.parameter_shapes(engine).items()
        self._shapes = {name: (s[0], s[1]) for name, s in shapes if is_hidden(name, s)}
        flats = zero.flats(engine)
        held = [[dataclasses.astuple(f) for f in flat.fragments] for flat in flats]
        of_ranks = distributed.gather_json(held)
        for i, flat in enumerate(flats):
            pieces = [[zero.Fragment(*f) for f in ranks[i]] for ranks in of_ranks]
            if all(f.name in self._shapes for part in pieces for f in part):
                self._plans[flat.tensor] = self._plan(pieces, distributed.rank())

    def _plan(self, pieces: list[list[zero.Fragment]], rank: int) -> _Plan:
        """pieces: of one flat tensor, by rank."""
        sizes = {f.name: self._numel(f.name) for part in pieces for f in part}
        work = [sum(sizes[f.name] for f in part if f.length == sizes[f.name]) for part in pieces]
        doers: dict[str, int] = {}
        cut = {f.name for part in pieces for f in part if f.length < sizes[f.name]}
        for name in sorted(cut, key=lambda name: (-sizes[name], name)):
            doers[name] = work.index(min(work))
            work[doers[name]] += sizes[name]
        ranks = range(len(pieces))
        return _Plan(
            here=[f for f in pieces[rank] if f.name not in cut],
            sent=[[f for f in pieces[rank] if doers.get(f.name) == other] for other in ranks],
            received=[[f for f in pieces[other] if doers.get(f.name) == rank] for other in ranks],
            shared=bool(cut),
        )

    def _numel(self, name: str) -> int:
        rows, columns = self._shapes[name]
        return rows * columns

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on `p.grad`, then the averages follow; a collective from ZeRO stage 1 on."""
        assert closure is None
        if not self._clip():
            return
        kept = []
        for p, state, group in self._with_gradients():
            if "momentum" in group:
                self._step_matrices(p, state, group)
                kept.append((p, p.grad))
        for p, _ in kept:
            p.grad = None  # AdamW leaves them alone
        super().step()
        for p, grad in kept:
            p.grad = grad
        self._average()

    def _step_matrices(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of a matrix, or of the pieces of matrices that a flat tensor holds."""
        state["step"] += 1
        assert p.grad is not None
        m = state["exp_avg"].mul_(group["momentum"]).add_(p.grad)
        update = torch.add(p.grad, m, alpha=group["momentum"])
        if p in self._plans:
            self._make_orthogonal(update, self._plans[p])
        else:
            update = scaled_orthogonal(update)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _make_orthogonal(self, flat: torch.Tensor, plan: _Plan) -> None:
        """All matrices of which a flat tensor holds pieces, in place."""
        for f in plan.here:
            piece = flat[f.start : f.start + f.length]
            piece.copy_(self._orthogonal(f.name, piece))
        if not plan.shared:
            return
        device = distributed.device()  # where matrices multiply fast, and ranks can talk
        mine = [f for part in plan.sent for f in part]
        theirs = [f for part in plan.received for f in part]
        sent, received = ([sum(f.length for f in p) for p in x] for x in (plan.sent, plan.received))
        outgoing = torch.empty(sum(sent), device=device)
        incoming = torch.empty(sum(received), device=device)
        for f, piece in zip(mine, outgoing.split([f.length for f in mine]), strict=True):
            piece.copy_(flat[f.start : f.start + f.length])
        dist.all_to_all_single(incoming, outgoing, received, sent)
        pieces = incoming.split([f.length for f in theirs])
        for name in sorted({f.name for f in theirs}):
            whole = torch.empty(self._numel(name), device=device)
            parts = [(f, x) for f, x in zip(theirs, pieces, strict=True) if f.name == name]
            for f, piece in parts:
                whole[f.offset : f.offset + f.length] = piece
            whole = self._orthogonal(name, whole)
            for f, piece in parts:
                piece.copy_(whole[f.offset : f.offset + f.length])
        dist.all_to_all_single(outgoing, incoming, sent, received)
        for f, piece in zip(mine, outgoing.split([f.length for f in mine]), strict=True):
            flat[f.start : f.start + f.length] = piece

    def _orthogonal(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Of a matrix as its values, (rows * columns,), the same of the step to take."""
        matrix = values.view(self._shapes[name]).to(distributed.device())
        return scaled_orthogonal(matrix).flatten()


def scaled_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The step along a matrix, whose values are about as large as those of AdamW's steps.

    matrix: (rows, columns), float32; computed in bf16 on GPUs, as both papers do. Source: Liu et
    al. 2025, section 2.2.
    """
    dtype = torch.bfloat16 if matrix.is_cuda else torch.float32
    return orthogonal(matrix, dtype=dtype) * (0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """About U V^T of a matrix U S V^T: singular values end between 0.68 and 1.21.

    Those below about 2e-3 of the norm stay smaller, and zero stays zero.

    matrix: (rows, columns), float32. dtype: to compute in. Source: Jordan et al. 2024, the
    Newton-Schulz iteration, five times.
    """
    x = (matrix / (matrix.norm() + 1e-30)).to(dtype)
    wide = matrix.shape[0] <= matrix.shape[1]
    x = x if wide else x.T
    for _ in range(5):
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, b, x, beta=3.4445)
    return (x if wide else x.T).to(matrix.dtype)


def is_hidden(name: str, shape: list[int]) -> bool:
    """Whether Muon trains a parameter of DiT: the matrices of its blocks.

    Embeddings (of patches, timesteps and labels), the final layer, biases and norms are AdamW's.
    """
    return name.startswith("blocks.") and len(shape) == 2


def build(
    model: torch.nn.Module,
    settings: Optimizer,
    *,
    zero_stage: int,
    ema_lengths: tuple[float, ...] = (),
) -> Muon:
    """The optimizer of a model, as `optim.build`; `attach` must follow."""
    assert settings.momentum is not None
    named = list(model.named_parameters())
    hidden = {name for name, p in named if is_hidden(name, zero.full_shape(p))}
    return Muon(
        [p for name, p in named if name in hidden],
        [p for name, p in named if name not in hidden],
        momentum=settings.momentum,
        **optim.common(settings, zero_stage=zero_stage, ema_lengths=ema_lengths),
    )
