"""What the network carries, and what a training step sends at each ZeRO stage beside the formula.

Run over ranks by `tools/benchmark.py network`; figures stand in tools/BENCHMARKS.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from dit_ds import distributed, network, zero
from dit_ds.benchmark import make_engine, step_on_noise

# The volume for each parameter is the same for any model whose matrices have more than the 10^5
# elements that stage 3 would keep whole.
_SIZES = {"patch_size": 8, "hidden_size": 320, "depth": 3, "num_heads": 5}
_BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}
_GRADIENT_BYTES, _WEIGHT_BYTES = 4, 2


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train: ZeRO's section of its DeepSpeed JSON, and activation checkpointing."""

    zero: dict[str, Any]
    checkpoint_every: int = 0


_LET_GO = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
WAYS = {
    "zero0": Way({"stage": 0}),
    "zero1": Way({"stage": 1}),
    "zero2": Way({"stage": 2}),
    "zero2_reduce": Way({"stage": 2, "use_multi_rank_bucket_allreduce": False}),
    "zero3": Way({"stage": 3}),
    "zero3_let_go": Way({"stage": 3, **_LET_GO}),
    "zero3_let_go_recompute": Way({"stage": 3, **_LET_GO}, checkpoint_every=1),
}


def formula(stage: int, micro_steps: int) -> int:
    """Bytes that a step sends for each parameter, after Rajbhandari et al. 2020, section 7.

    At stage 0 an all-reduce, which counts twice; at stages 1 and 2 a reduce-scatter of gradients
    and a gather of weights; at stage 3 two gathers. From stage 2 on gradients are reduced in each
    micro-step, since no rank keeps them whole, and at stage 3 weights are gathered in each. The
    factor (n - 1) / n of n ranks is left out.
    """
    gradients = _GRADIENT_BYTES * (micro_steps if stage >= 2 else 1)
    weights = _WEIGHT_BYTES * (2 * micro_steps if stage == 3 else 1)
    return 2 * gradients if stage == 0 else gradients + weights


class Sent(TorchDispatchMode):
    """Counts the bytes that torch is asked to send within its block, whoever asks, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__.strip("_")
            # Output and input, of which one is the whole and the other may be a rank's share.
            whole = max((_bytes(argument) for argument in args[:2]), default=0)
            self.bytes[name] += 2 * whole if name.startswith("allreduce") else whole
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(argument) if isinstance(t, torch.Tensor))


def volume(way: Way, *, micro_steps: int) -> float:
    """Bytes that a real training step sends for each parameter, counted; a collective."""
    # DeepSpeed's 16 bits are refused at stage 0, which reduces in fp32 with or without them.
    ds_config = {"zero_optimization": way.zero} | (_BF16 if way.zero["stage"] else {})
    engine, _ = make_engine(
        _SIZES, ds_config, micro_steps=micro_steps, checkpoint_every=way.checkpoint_every
    )
    for _ in range(2):  # stage 3 learns the order of the weights from these
        step_on_noise(engine)
    with Sent() as sent:
        step_on_noise(engine)
    parameters = sum(torch.Size(s).numel() for s in zero.parameter_shapes(engine).values())
    engine.destroy()
    gc.collect()
    return sum(sent.bytes.values()) / parameters


def measure(*, repeats: int = 5) -> dict[str, float]:
    """Links, collectives, and the volume of a step in each of `WAYS` with 1 and 4 micro-steps.

    A collective.

    Raises:
        ValueError: there is one rank, or the ranks do not add up right.
    """
    distributed.init()
    if distributed.world_size() == 1:
        raise ValueError(
            "one rank has no network; run this over several: "
            "launch/run.sh --num_gpus 2 tools/benchmark.py network, or --hostfile launch/hosts"
        )
    found: dict[str, float] = {}
    with contextlib.redirect_stdout(sys.stderr):
        told = network.measure(repeats=repeats)
        if told["wrong_sums"]:
            raise ValueError(f"wrong sums in an all-reduce on {', '.join(told['wrong_sums'])}")
        for link in told["links"]:
            name = "_".join(("link", *link["hosts"]))
            found[f"{name}_bytes_per_second"] = link["bytes_per_second"]
            found[f"{name}_latency_seconds"] = link["latency_seconds"]
        for name, rate in told["bus_bytes_per_second"].items():
            found[f"{name}_bus_bytes_per_second"] = rate
        quiet = None if distributed.is_main() else True
        for name, way in tqdm(WAYS.items(), disable=quiet, leave=False):
            for micro_steps in (1, 4):
                bytes_sent = volume(way, micro_steps=micro_steps)
                expected = formula(way.zero["stage"], micro_steps)
                found[f"{name}_k{micro_steps}_bytes_per_parameter"] = bytes_sent
                found[f"{name}_k{micro_steps}_over_formula"] = bytes_sent / expected
    return found
