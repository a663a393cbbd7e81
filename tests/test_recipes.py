"""Every recipe builds what its name says, starts as its comment says, and trains when shrunk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_ds import config, flops, zero_config
from dit_ds.loader import Split
from dit_ds.manifest import Manifest
from dit_ds.models import DIT_MODELS, DiT
from dit_ds.rundir import describe
from tests import runs
from tests.conftest import REPO, make_latents, run_ranks

# The model of each, and its parameters in millions with the fixed position embedding.
RECIPES = {
    "dit-s-2-256": ("DiT-S/2", 33),
    "dit-b-2-256": ("DiT-B/2", 131),
    "dit-l-2-256": ("DiT-L/2", 458),
    "dit-xl-2-256": ("DiT-XL/2", 675),
    "dit-xl-2-256-8gpu": ("DiT-XL/2", 675),
    "dit-xl-2-256-64gpu": ("DiT-XL/2", 675),
    "dit-s-2-512": ("DiT-S/2", 33),
    "dit-b-2-512": ("DiT-B/2", 131),
    "dit-l-2-512": ("DiT-L/2", 459),
    "dit-xl-2-512": ("DiT-XL/2", 676),
    "modern-xl-2-256": ("DiT-XL/2", 675),
    "dit-3b-2-256": ("DiT-3B/2", 3078),
    "dit-7b-2-256": ("DiT-7B/2", 6982),
}
ALL = sorted(path.stem for path in config.RECIPES.glob("*.yaml"))
OF_DIGITS = {"quickstart", "quickstart-modern"}
assert RECIPES.keys() | OF_DIGITS == set(ALL)


def ds_config_of(name: str) -> Path:
    """The file that the command in the recipe's comment names, or the quickstart's script."""
    text = (config.RECIPES / f"{name}.yaml").read_text()
    if name == "quickstart":
        text = (REPO / "launch" / "quickstart.sh").read_text()
    found = re.findall(r"ds_configs/\w+\.json", text)
    assert len(set(found)) == 1, f"{name} names {found}"
    return REPO / found[0]


def imagenet(image_size: int) -> Manifest:
    """What data of 1000 classes at this size says of itself."""
    return Manifest(
        created_by="tests",
        class_names=tuple(str(i) for i in range(1000)),
        image_size=image_size,
        latent_shape=(4, image_size // 8, image_size // 8),
        scaling_factor=0.18215,
        vae={"name": "none", "sha256": "0" * 64},  # type: ignore[arg-type]
        shards=({"name": "a.tar", "num_samples": 1, "num_bytes": 1, "sha256": "0" * 64},),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_builds_the_model_of_its_name(name: str) -> None:
    cfg = config.load(name)
    model, millions = RECIPES[name]
    assert (cfg.name, cfg.model.name) == (name, model)
    ds_config = zero_config.load(ds_config_of(name))
    sizes = describe(cfg, ds_config, imagenet(512 if "512" in name else 256))["weights"]["model"]
    cost = flops.cost(**sizes)
    assert round((cost.parameters + cost.position_embedding) / 1e6) == millions
    with torch.device("meta"):
        built = DiT(**sizes)
    assert sum(p.numel() for p in built.parameters()) == cost.parameters
    assert sizes | DIT_MODELS[model] == sizes


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_starts_as_its_comment_says(name: str) -> None:
    cfg, text = config.load(name), (config.RECIPES / f"{name}.yaml").read_text()
    assert f"--config {name} " in text
    ranks = cfg.train.expect_ranks or 8
    assert ("--num_gpus 8 " in text) == (ranks == 8)
    assert ("--hostfile launch/hosts " in text) == (ranks == 64)
    batch, micro = cfg.train.global_batch_size, cfg.train.micro_batch_size
    split = Split.of(global_batch=batch, world_size=ranks, micro_batch=micro)
    assert not split.padding and split.micro_batch == micro
    stage = zero_config.load(ds_config_of(name))["zero_optimization"]["stage"]
    assert stage == (3 if name.endswith(("3b-2-256", "7b-2-256")) else 2)


def train_all(configs: dict[str, str], data: str, out: str) -> None:
    """Two steps of every recipe, shrunk, in this process."""
    from dit_ds import distributed, launched, train

    distributed.init()
    requests = launched.Requests()
    for name, ds_config in configs.items():
        small = [
            *("model.name=null", "model.patch_size=2", "model.hidden_size=32", "model.depth=1"),
            *("model.num_heads=2", f"data.path={data}", "data.workers=0", "data.flip=0"),
            *("train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2"),
            *("train.log_every=1", "train.checkpoint_every=2", "train.expect_ranks=null"),
            *("preview.every=0", "optimizer.warmup_steps=1"),
        ]
        cfg = config.load(name, small)
        train.train(cfg, zero_config.load(ds_config), Path(out) / name, requests)
    distributed.shutdown()


def test_each_recipe_trains_when_shrunk(tmp_path: Path) -> None:
    make_latents(tmp_path / "latents", (8,))
    configs = {name: str(ds_config_of(name)) for name in ALL}
    run_ranks(1, train_all, configs, str(tmp_path / "latents"), str(tmp_path))
    for name in ALL:
        losses: list[Any] = runs.losses(tmp_path / name)
        # Zero output at first: the mean square of the noise, and a variance term of about nothing;
        # under flow that of the latents too, 1/4 (1 + e^(1/2)) as `make_latents` makes them.
        first = 1.66 if config.load(name).objective.name == "flow" else 1.0
        assert len(losses) == 2 and losses == pytest.approx([first, first], abs=0.3), name
