"""The training as a whole: equal to plain PyTorch, in every topology and configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dit_ds import config, optim
from dit_ds.ddpm import DDPM
from dit_ds.latents import LatentSpace
from dit_ds.loader import Loader, Split
from dit_ds.manifest import Folder, Manifest
from dit_ds.models import DiT
from dit_ds.rundir import describe
from dit_ds.settings import Config, Optimizer
from tests import runs
from tests.conftest import REPO, run_ranks

STEPS = 20
# 16 samples on three ranks are 6, 5 and 5; on two ranks two micro-steps of 4.
BATCH = ("train.global_batch_size=16", f"train.steps={STEPS}", "train.checkpoint_every=20")


def adamw(model: torch.nn.Module, o: Optimizer) -> Any:
    return torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )


def plain_pytorch(cfg: Config, make: Any = adamw) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training without DeepSpeed, ranks or micro-steps: losses and final state."""
    manifest = Manifest.load(cfg.data.path)
    batch_size = cfg.train.global_batch_size
    loader = Loader(
        Folder(cfg.data.path),
        manifest,
        Split.of(global_batch=batch_size, world_size=1, micro_batch=batch_size),
        lanes=cfg.lanes,
        window=cfg.data.window,
        seed=cfg.seed,
        flip=cfg.data.flip,
        first_step=0,
        last_step=cfg.train.steps,
        workers=0,
    )
    model = DiT(**describe(cfg, {}, manifest)["weights"]["model"])
    model.initialize_weights(cfg.seed)
    objective = DDPM(manifest.num_classes, class_dropout=cfg.objective.class_dropout)
    space = LatentSpace(manifest.scaling_factor, manifest.shift_factor)
    o = cfg.optimizer
    optimizer = make(model, o)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(cfg.train.steps):
        (micro,) = loader.next()
        x_start = space.sample(micro.moments, micro.posterior)
        loss = objective.loss(model, x_start, micro)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = o.lr * min(1.0, (step + 1) / o.warmup_steps)
        optimizer.step()
        t = step + 1
        for name, p in model.named_parameters():
            ema[name].lerp_(p.detach(), 1 - min(o.ema_decay, (1 + t) / (10 + t)))
        losses.append(loss.item())
    state = {f"fp32/{name}": p.detach() for name, p in model.named_parameters()}
    return losses, state | {f"ema/{name}": average for name, average in ema.items()}


@pytest.mark.parametrize(
    ("stage", "world"), [(0, 2), (1, 2), (2, 2), (3, 2), (0, 3), (1, 3), (2, 3), (3, 3)]
)
def test_ranks_follow_the_curve_of_one_plain_pytorch_process(
    tiny: dict[str, Any], tmp_path: Path, stage: int, world: int
) -> None:
    ds_config = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
    run_ranks(world, runs.train, *runs.arguments(tiny, ds_config, *BATCH))
    expected, weights = plain_pytorch(config.load(str(tiny["recipe"]), BATCH))
    # Only the order of float32 sums differs.
    assert runs.losses(tiny["run"]) == pytest.approx(expected, rel=1e-5)
    state = runs.state_of(tiny["run"], STEPS)
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)


# Quantised communication needs CUDA: tests/test_zero_config.py says what is known of it.
ON_CPU = sorted(set((REPO / "ds_configs").glob("*.json")) - {REPO / "ds_configs" / "zeropp.json"})


@pytest.mark.parametrize("path", ON_CPU, ids=lambda p: p.stem)
def test_every_deepspeed_config_trains_on_two_ranks(tiny: dict[str, Any], path: Path) -> None:
    run_ranks(2, runs.train, *runs.arguments(tiny, path))
    expected, _ = plain_pytorch(config.load(str(tiny["recipe"])))
    # bf16 has 8 bits of mantissa: single steps agree to about 1e-3.
    assert runs.losses(tiny["run"]) == pytest.approx(expected, rel=5e-3)
    assert all(m["skipped_steps"] == 0 for m in runs.metrics(tiny["run"]))


@pytest.mark.parametrize(("stage", "every"), [(0, 1), (1, 2), (2, 1), (3, 1), (3, 2)])
def test_activation_checkpointing_changes_no_number(
    tiny: dict[str, Any], tmp_path: Path, stage: int, every: int
) -> None:
    ds_config = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
    run_ranks(2, runs.train, *runs.arguments(tiny, ds_config))
    plain = runs.state_of(tiny["run"], 6)
    tiny["run"] = tmp_path / "checkpointed"
    run_ranks(2, runs.train, *runs.arguments(tiny, ds_config, f"model.checkpoint_every={every}"))
    runs.assert_same_bits(plain, runs.state_of(tiny["run"], 6))


def test_a_gradient_that_is_not_finite_is_skipped_at_stage_0() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    adamw = optim.build([p], Optimizer(), zero_stage=0)
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    adamw.step()
    assert adamw.overflow and torch.equal(p, torch.ones(3)) and not adamw.state[p]
