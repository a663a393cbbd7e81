"""Muon on ZeRO's partitions: what one plain process computes, in every topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_ds import config, muon
from dit_ds.settings import Optimizer
from tests import runs
from tests.conftest import REPO, run_ranks
from tests.test_train import plain_pytorch

MUON = ("optimizer.name=muon", "optimizer.weight_decay=0.1")


def by_singular_values(matrix: np.ndarray) -> np.ndarray:
    """U f(S) V^T, f being Jordan's polynomial five times over, on S over the norm; float64."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(matrix)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return np.asarray(u * s @ vt)


class Reference:
    """Muon in float64 for the matrices of the blocks, torch's AdamW for the rest."""

    def __init__(self, model: torch.nn.Module, o: Optimizer) -> None:
        named = dict(model.named_parameters())
        self.hidden = [p for n, p in named.items() if n.startswith("blocks.") and p.ndim == 2]
        ids = {id(p) for p in self.hidden}
        self.adamw = torch.optim.AdamW(
            [p for p in named.values() if id(p) not in ids],
            lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay,
        )  # fmt: skip
        self.decay = o.weight_decay
        self.param_groups, self.zero_grad = self.adamw.param_groups, model.zero_grad
        self.momenta = [np.zeros(p.shape) for p in self.hidden]

    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for p, m in zip(self.hidden, self.momenta, strict=True):
            assert p.grad is not None
            g, w = p.grad.double().numpy(), p.detach().double().numpy()
            m *= 0.95
            m += g
            scale = 0.2 * max(w.shape) ** 0.5
            step = by_singular_values(g + 0.95 * m) * scale if g.any() or m.any() else 0
            with torch.no_grad():
                p.copy_(torch.from_numpy(w - lr * self.decay * w - lr * step))
        self.adamw.step()


@pytest.mark.parametrize("shape", [(40, 40), (16, 70), (90, 30)])
def test_what_comes_out_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    if shape[0] == shape[1]:
        matrix += 2 * np.eye(40)  # a square one of noise alone has values near zero
    # bf16, as on GPUs, has 8 bits, and the iteration multiplies what they round off.
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = muon.orthogonal(torch.from_numpy(matrix).float(), dtype=dtype)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, by_singular_values(matrix), atol=tolerance)
        values = np.linalg.svd(found.numpy(), compute_uv=False)
        assert 0.6 < values.min() and values.max() < 1.2
        assert not muon.orthogonal(torch.zeros(shape), dtype=dtype).any()


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 3), (3, 2)])
def test_ranks_follow_one_plain_process(
    tiny: dict[str, Any], tmp_path: Path, stage: int, world: int
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
    run_ranks(world, runs.train, *runs.arguments(tiny, ds, *MUON))
    losses, weights = plain_pytorch(config.load(str(tiny["recipe"]), MUON), Reference)
    assert runs.losses(tiny["run"]) == pytest.approx(losses, rel=1e-5)
    state = runs.state_of(tiny["run"], 6)
    # Small singular values, and so their rounding, are multiplied by up to 3.4^5.
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)
    moved = {n for n, v in state.items() if n.startswith("exp_avg_sq/") and v.any()}
    adamw = {n for n in moved if not n.startswith("exp_avg_sq/blocks.") or n.endswith("bias")}
    assert moved == adamw != set()


@pytest.mark.parametrize("name", ["zero1", "zero2_fp16"])
def test_a_resumed_run_is_bitwise_the_same(tiny: dict[str, Any], tmp_path: Path, name: str) -> None:
    ds = REPO / "ds_configs" / f"{name}.json"
    words = (*MUON, "post_hoc_ema.every=2")
    run_ranks(2, runs.train, *runs.arguments(tiny, ds, *words))
    whole, losses = runs.state_of(tiny["run"], 6), runs.losses(tiny["run"])
    tiny["run"] = tmp_path / "resumed"
    for steps in (3, 6):
        run_ranks(2, runs.train, *runs.arguments(tiny, ds, *words, f"train.steps={steps}"))
    runs.assert_same_bits(whole, runs.state_of(tiny["run"], 6))
    assert runs.losses(tiny["run"]) == losses


def test_a_run_goes_on_in_another_topology(tiny: dict[str, Any], tmp_path: Path) -> None:
    for stage, world, steps in ((2, 2, 2), (3, 3, 4), (2, 1, 6)):
        ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
        words = (*MUON, f"train.steps={steps}")
        run_ranks(world, runs.train, *runs.arguments(tiny, ds, *words))
    losses, weights = plain_pytorch(config.load(str(tiny["recipe"]), MUON), Reference)
    assert runs.losses(tiny["run"]) == pytest.approx(losses, rel=1e-5)
    state = runs.state_of(tiny["run"], 6)
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"momentum": 0.9}, "optimizer.momentum=0.9 has no meaning for optimizer.name=adamw"),
        ({"name": "muon", "rho": 0.1}, "optimizer.rho=0.1 has no meaning for optimizer.name=muon"),
        ({"name": "muon", "momentum": None}, "optimizer.momentum must be set"),
        ({"name": "muon", "momentum": 1.0}, "optimizer.momentum=1.0"),
    ],
)
def test_settings_of_another_optimizer_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(config.ConfigError, match=sentence):
        config.parse({"model": {"name": "DiT-S/2"}, "optimizer": settings}, "test")
