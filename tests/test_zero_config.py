"""ZeRO++: what is refused where it cannot work, and what of it can be tried without CUDA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from dit_ds import zero_config
from dit_ds.config import ConfigError
from tests import runs
from tests.conftest import REPO, make_latents, run_ranks

ZEROPP = REPO / "ds_configs" / "zeropp.json"


@pytest.mark.parametrize("path", sorted((REPO / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_deepspeeds_own_model_knows_every_key(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = zero_config.load(path)["zero_optimization"]
    known = DeepSpeedZeroConfig(**section)
    aliases = {f.alias: name for name, f in DeepSpeedZeroConfig.model_fields.items() if f.alias}
    values = known.model_dump(mode="json")
    for key, value in section.items():
        if not isinstance(value, dict):
            assert values[aliases.get(key, key)] == value
    with pytest.raises(pydantic.ValidationError):
        DeepSpeedZeroConfig(**section, zero_quantised_weights=True)


def test_quantised_communication_is_refused_on_cpus_by_every_rank(tiny: dict[str, Any]) -> None:
    told = run_ranks(2, runs.train, *runs.arguments(tiny, ZEROPP), expect=2)
    assert "zero_quantized_weights=true needs CUDA, and this rank runs on cpu" in told[0]
    assert "ds_configs/zero3_cluster.json" in told[0] and "(rank" not in told[0]
    assert not tiny["run"].exists()


@pytest.mark.parametrize(
    ("change", "ranks_of_hosts", "sentence"),
    [
        ({}, [8, 8], ""),
        ({}, [16], ""),
        ({}, [4, 4], "zero_hpz_partition_size=8 does not divide the ranks of every host (4, 4)"),
        ({"zero_quantized_gradients": False}, [8, 4], "set it to 4"),
        ({}, [8, 16], "as many ranks on each host, and they have 8, 16"),
    ],
)
def test_partitions_must_fit_the_hosts(
    change: dict[str, Any], ranks_of_hosts: list[int], sentence: str
) -> None:
    tree = zero_config.load(ZEROPP)
    tree["zero_optimization"] |= change
    if not sentence:
        zero_config.check_world(tree, "x", device="cuda", ranks_of_hosts=ranks_of_hosts)
        return
    with pytest.raises(ConfigError) as error:
        zero_config.check_world(tree, "x", device="cuda", ranks_of_hosts=ranks_of_hosts)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (
            {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}},
            "zero_hpz_partition_size=8 does nothing at ZeRO stage 2",
        ),
        (
            {
                "zero_optimization": {"stage": 2},
                "fp16": {"enabled": True, "auto_cast": True},
            },
            "fp16.auto_cast=true would round the times of flow matching",
        ),
        (
            {
                "zero_optimization": {"stage": 3, "zero_quantized_gradients": True},
                "bf16": {"enabled": True},
                "communication_data_type": "fp32",
            },
            "zero_quantized_gradients=true with bf16 and communication_data_type=fp32",
        ),
    ],
)
def test_what_deepspeed_would_get_wrong_in_silence_is_refused(
    tmp_path: Path, tree: dict[str, Any], sentence: str
) -> None:
    path = runs.write_json(tmp_path / "ds.json", tree)
    with pytest.raises(ConfigError) as error:
        zero_config.load(path)
    assert sentence in str(error.value) and str(path) in str(error.value)


def test_a_hierarchical_partition_changes_no_number(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Two hosts of two ranks, with averaged weights in validation and a resume in between."""
    make_latents(tmp_path / "validation", (24,), first=500)
    tree = tiny["tree"] | {"validation": {"path": str(tmp_path / "validation"), "every": 2}}
    tiny["recipe"].write_text(yaml.safe_dump(tree))
    curves = []
    for size in (1, 2):
        # What is not needed soon is let go, so that a backward pass gathers from the second copy.
        zero = {"stage": 3, "zero_hpz_partition_size": size, "stage3_prefetch_bucket_size": 0}
        zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        ds = runs.write_json(tmp_path / f"ds-{size}.json", {"zero_optimization": zero})
        run = tiny | {"run": tmp_path / f"run-{size}"}
        for steps in (3, 6):
            run_ranks(4, train_on_two_hosts, runs.arguments(run, ds, f"train.steps={steps}"))
        curves.append([[m.get(k) for k in KEPT] for m in runs.metrics(run["run"])])
    assert curves[0] == curves[1] and any(averaged for _, averaged in curves[0])


KEPT = ("loss", "validation_ema/loss")


def train_on_two_hosts(arguments: list[str]) -> None:
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    runs.train(*arguments)


def test_a_partition_larger_than_a_host_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 4}
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": zero})
    told = run_ranks(4, train_on_two_hosts, runs.arguments(tiny, ds), expect=2)
    assert "does not divide the ranks of every host (2, 2)" in told[0] and "to 2" in told[0]
