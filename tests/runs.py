"""What tests run in ranks, and what they read back from a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def train(*arguments: str) -> None:
    """`dit_ds.train` in a forked rank."""
    from dit_ds import train

    train.main(arguments)


def arguments(tiny: dict[str, Any], ds_config: Path | str, *overrides: str) -> list[str]:
    """The command line of a run of the `tiny` fixture."""
    recipe, run = str(tiny["recipe"]), str(tiny["run"])
    return ["--config", recipe, "--run", run, "--deepspeed_config", str(ds_config), *overrides]


def engine(recipe: Path | str, ds_config: Path | str) -> tuple[Any, dict[str, Any]]:
    """An engine of a recipe in this world, and what its checkpoints say of themselves."""
    from dit_ds import config, distributed, rundir, train, zero_config
    from dit_ds.loader import Split
    from dit_ds.manifest import Manifest

    distributed.init()
    cfg, tree = config.load(str(recipe)), zero_config.load(ds_config)
    about = rundir.describe(cfg, tree, Manifest.load(cfg.data.path))
    world = distributed.world_size()
    split = Split.of(global_batch=12, world_size=world, micro_batch=4)
    return train.build_engine(cfg, tree, split, about["weights"]["model"]), about


def write_json(path: Path, tree: dict[str, Any]) -> Path:
    """`tree` as a file."""
    path.write_text(json.dumps(tree))
    return path


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The logged losses, step after step."""
    return [m["loss"] for m in metrics(run) if "loss" in m]


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, put together: `KEY/PARAMETER` and `module/BUFFER`."""
    from dit_ds import archive

    found = archive.Checkpoint.open(run / "checkpoints" / f"step-{step:08d}")
    ranges = archive.Ranges(found)
    state = {
        f"{key}/{name}": ranges.whole(key, name)
        for name in found.index.parameters
        for key in found.index.keys
    }
    for name, parameter in found.index.parameters.items():
        state |= {f"{key}/{name}": torch.tensor(v) for key, v in parameter.scalars.items()}
    return state | {f"module/{k}": v for k, v in archive.unsharded(found).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Two states hold the same tensors, bitwise."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:5]}"
