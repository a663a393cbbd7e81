"""DeepSpeed's JSON: what it owns (ZeRO, offload, communication, precision), and nothing else.

What the recipe owns is refused here, and what this version cannot do right, before any process
group exists. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_ds.config import DEEPSPEED_KEYS, RECIPE_OWNS, ConfigError, nearest

_QUANTIZED = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
_SECTIONS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "comms_logger")


def load(path: str | Path) -> dict[str, Any]:
    """Memory, communication and precision from a DeepSpeed JSON file.

    Raises:
        ConfigError: the file cannot be read, or holds a key that is unknown or the recipe's.
    """
    try:
        tree = json.loads(Path(path).read_text())
    except OSError as e:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise ConfigError(f"--deepspeed_config {path}: not valid JSON ({e})") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"--deepspeed_config {path}: expected a JSON object")
    for key in tree:
        if key in RECIPE_OWNS:
            raise ConfigError(
                f"--deepspeed_config {path}: {key} belongs to the recipe; remove it here and set "
                f"{RECIPE_OWNS[key]} there"
            )
        if key not in DEEPSPEED_KEYS:
            raise ConfigError(
                f"--deepspeed_config {path}: unknown key {key}{nearest(key, DEEPSPEED_KEYS)}"
            )
    for key in tree:
        if key in _SECTIONS and not isinstance(tree[key], dict):
            raise ConfigError(f"--deepspeed_config {path}: {key} is a section; write it as {{...}}")
    zero = tree.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2, 3) or isinstance(zero.get("stage"), bool):
        raise ConfigError(
            f"--deepspeed_config {path}: zero_optimization.stage={zero['stage']!r}; "
            "choose 0, 1, 2 or 3"
        )
    _check_offload(zero, f"--deepspeed_config {path}")
    _check_zeropp(tree, f"--deepspeed_config {path}")
    if tree.get("torch_autocast", {}).get("dtype") in ("float16", "fp16"):
        raise ConfigError(
            f"--deepspeed_config {path}: torch_autocast in float16 scales the loss outside of the "
            "checkpoint; use bfloat16, or fp16.enabled as in ds_configs/zero2_fp16.json"
        )
    if tree.get("fp16", {}).get("auto_cast"):
        raise ConfigError(
            f"--deepspeed_config {path}: fp16.auto_cast=true would round the times of flow "
            "matching to 11 bits, and the model casts its latents itself; remove it"
        )
    half = [k for k in ("bf16", "fp16") if tree.get(k, {}).get("enabled")]
    if half and zero.get("stage", 0) == 0:
        raise ConfigError(
            f"--deepspeed_config {path}: {half[0]} at ZeRO stage 0 is refused: DeepSpeed's wrapper "
            "there decays the weights once before the first step and accumulates in 16 bits; use "
            "stage 1, or torch_autocast as in ds_configs/zero0.json"
        )
    return tree


def _check_offload(zero: dict[str, Any], source: str) -> None:
    """Refuse ways to offload that keep the state where checkpoint and EMA do not find it."""
    for key in ("zenflow", "super_offload"):
        if zero.get(key) or (zero.get("offload_optimizer") or {}).get(key):
            raise ConfigError(f"{source}: {key} is not supported; leave it out")
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) or {}
        if section.get("device", "none") not in ("none", "cpu") or section.get("ratio", 1) != 1:
            raise ConfigError(
                f"{source}: {key} to {section.get('device')} with ratio {section.get('ratio', 1)} "
                "is not supported; choose device cpu, and all of it"
            )


def _check_zeropp(tree: dict[str, Any], source: str) -> None:
    """Refuse what DeepSpeed would do without, or with wrong numbers, and not say."""
    zero, reduced_in = tree.get("zero_optimization", {}), tree.get("communication_data_type")
    keys = (*_QUANTIZED, "zero_hpz_partition_size")
    used = [key for key in keys if zero.get(key) not in (None, False, 1)]
    stage = zero.get("stage", 0)
    if used and stage != 3:
        raise ConfigError(
            f"{source}: {used[0]}={zero[used[0]]} does nothing at ZeRO stage {stage}; set "
            "zero_optimization.stage=3, or remove it"
        )
    if zero.get("zero_quantized_gradients") and (precision(tree), reduced_in) != ("fp16", "fp16"):
        raise ConfigError(
            f"{source}: zero_quantized_gradients=true with {precision(tree)} and "
            f"communication_data_type={reduced_in}: DeepSpeed's kernel takes any bytes for fp16; "
            "set fp16.enabled and communication_data_type=fp16 as in ds_configs/zeropp.json, or "
            "zero_quantized_gradients=false"
        )


def check_world(
    tree: dict[str, Any], source: str, *, device: str, ranks_of_hosts: Sequence[int]
) -> None:
    """Refuse ways to communicate that these devices or hosts are not made for.

    device: `cuda` or `cpu`. ranks_of_hosts: how many ranks each host runs.

    Raises:
        ConfigError: quantised communication without CUDA, or over unlike hosts; a hierarchical
            partition that does not fit into each host.
    """
    zero = tree.get("zero_optimization", {})
    quantized = [key for key in _QUANTIZED if zero.get(key)]
    if quantized and device != "cuda":
        raise ConfigError(
            f"{source}: {quantized[0]}=true needs CUDA, and this rank runs on {device}: DeepSpeed "
            "quantises by CUDA kernels only; take ds_configs/zero3_cluster.json here"
        )
    told = ", ".join(map(str, ranks_of_hosts))
    if zero.get("zero_quantized_gradients") and len(set(ranks_of_hosts)) > 1:
        raise ConfigError(
            f"{source}: zero_quantized_gradients=true needs as many ranks on each host, and they "
            f"have {told}; choose devices by --include, or set it to false"
        )
    size = zero.get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and any(num % size for num in ranks_of_hosts):
        raise ConfigError(
            f"{source}: zero_hpz_partition_size={size} does not divide the ranks of every host "
            f"({told}), and a second copy of the weights would span hosts; set it to "
            f"{math.gcd(*ranks_of_hosts)}"
        )


def precision(deepspeed: dict[str, Any]) -> str:
    """`bf16`, `fp16` or `fp32`, with ` autocast` where weights stay in fp32."""
    for key in ("bf16", "fp16"):
        if deepspeed.get(key, {}).get("enabled"):
            return key
    autocast = deepspeed.get("torch_autocast", {})
    return f"{autocast.get('dtype', 'bfloat16')} autocast" if autocast.get("enabled") else "fp32"
