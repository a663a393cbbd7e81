"""Where a DeepSpeed engine keeps each parameter's float32 state, at every ZeRO stage.

The checkpoint, the export and the previews need to know which elements of which parameter this
rank holds. DeepSpeed has no public name for it (and `_hp_mapping` is wrong under
`round_robin_gradients`), so the private names stand here and nowhere else, and `check_engine`
compares them with the installed version at the start.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + length) of a parameter, kept at [start, ...) of a flat tensor."""

    name: str
    offset: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Flat:
    """A float32 tensor of master weights that the client optimizer knows as one parameter.

    tensor: the key into the optimizer's state. fragments: what it holds; the rest is padding.
    written: what this rank writes of it, a share at stage 0, where all ranks hold the same.
    """

    tensor: torch.Tensor
    fragments: tuple[Fragment, ...]
    written: tuple[Fragment, ...]


_NAMES_BY_KIND = {
    "stage 3": (
        "fp32_partitioned_groups_flat", "fp16_groups", "_get_param_partition_rank",
        "_reassign_or_swap_out_partitioned_parameters",
        "checkpoint_event_prologue", "checkpoint_event_epilogue",
    ),
    "BF16_Optimizer": (
        "fp32_groups_flat_partition", "bf16_groups", "bf16_groups_flat", "real_dp_process_group",
        "update_lp_params", "_lazy_init_hp_params_optimizer_state", "_hp_optimizer_states_linked",
    ),
    "stage 1 or 2": (
        "single_partition_of_fp32_groups", "bit16_groups", "bit16_groups_flat",
        "real_dp_process_group", "update_lp_params", "_lazy_init_hp_params_optimizer_state",
        "_hp_optimizer_states_linked",
    ),
    "stage 0": ("param_groups", "state"),
}  # fmt: skip
_NAMES_OF_ENGINE = (
    "basic_optimizer", "optimizer", "param_names", "global_steps", "global_samples",
    "skipped_steps", "micro_steps",
)  # fmt: skip
_NAMES_OF_STAGE_3_PARAMETER = ("ds_id", "ds_shape", "ds_numel", "ds_tensor", "partition_numel")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _kind(engine: Any) -> str:
    names = ("fp32_partitioned_groups_flat", "bf16_groups", "single_partition_of_fp32_groups")
    for kind, name in zip(_NAMES_BY_KIND, names, strict=False):
        if hasattr(engine.optimizer, name):
            return kind
    return "stage 0"


def check_engine(engine: Any) -> None:
    """Refuse an engine whose layout is not the one this file knows, by its names and its values.

    Raises:
        ValueError: names DeepSpeed's version, what is missing or wrong, and the remedy.
    """
    kind, stage = _kind(engine), engine.zero_optimization_stage()
    known = {"stage 3": (3,), "BF16_Optimizer": (1,), "stage 1 or 2": (1, 2), "stage 0": (0,)}[kind]
    parameters = dict(engine.module.named_parameters())
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    wanted: list[tuple[Any, tuple[str, ...]]] = [
        (engine, _NAMES_OF_ENGINE),
        (engine.optimizer, _NAMES_BY_KIND[kind]),
        (scaler, _SCALER_FIELDS if getattr(scaler, "dynamic", False) else ()),
    ]
    if engine.fp16_enabled():
        wanted += [(engine.optimizer, ("loss_scaler",)), (scaler, ("dynamic",))]
    if kind == "stage 3":
        wanted += [(p, _NAMES_OF_STAGE_3_PARAMETER) for p in parameters.values()]
    faults = [f"no {name}" for thing, names in wanted for name in names if not hasattr(thing, name)]
    if stage not in known:
        faults.append(f"its layout is that of {kind}")
    if not faults:
        # Names may stay when their meaning changes: each master must round to its weight.
        try:
            for flat in flats(engine):
                for f in flat.fragments:
                    weights = _local_weights(parameters[f.name], f)
                    masters = flat.tensor.detach().view(-1)[f.start : f.start + f.length]
                    if not torch.equal(masters.to(weights), weights):
                        faults.append(f"the master weights of {f.name} are not where they were")
        except (AssertionError, LookupError, RuntimeError) as e:
            faults.append(f"{type(e).__name__} {e}")
    if faults:
        raise unknown_layout(engine, ", ".join(faults[:3]))


def unknown_layout(engine: Any, fault: str) -> ValueError:
    """The error for an engine that keeps its state otherwise than this file knows."""
    return ValueError(
        f"deepspeed=={deepspeed.__version__} keeps the state of ZeRO stage "
        f"{engine.zero_optimization_stage()} in an unknown way ({type(engine.optimizer).__name__}: "
        f"{fault}); install the version that constraints.txt pins"
    )


def _local_weights(p: torch.Tensor, fragment: Fragment) -> torch.Tensor:
    """The working weights of a fragment, (length,)."""
    if hasattr(p, "ds_tensor"):  # this rank's partition begins where its fragment does
        return p.ds_tensor.detach().view(-1)[: fragment.length]
    return p.detach().view(-1)[fragment.offset : fragment.offset + fragment.length]


def client_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that was handed to `deepspeed.initialize`."""
    return engine.basic_optimizer


def full_shape(p: torch.Tensor) -> list[int]:
    """Shape of a parameter, whatever part of it this rank holds."""
    return list(getattr(p, "ds_shape", p.shape))


def parameter_shapes(engine: Any) -> dict[str, list[int]]:
    """Full shape of every trained parameter."""
    return {name: full_shape(p) for name, p in engine.module.named_parameters() if p.requires_grad}


def flats(engine: Any) -> list[Flat]:
    """The master weights on this rank, with what each holds of which parameter."""
    names, optimizer = engine.param_names, engine.optimizer
    return {
        "stage 3": _flats_of_stage_3,
        "BF16_Optimizer": _flats_of_stage_1_and_2,
        "stage 1 or 2": _flats_of_stage_1_and_2,
        "stage 0": _flats_of_stage_0,
    }[_kind(engine)](optimizer, names)


def _flats_of_stage_3(optimizer: Any, names: dict[Any, str]) -> list[Flat]:
    found = []
    for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        fragments, start = [], 0
        for p in optimizer.fp16_groups[i]:
            size = p.partition_numel()
            offset = optimizer._get_param_partition_rank(p) * size
            length = max(0, min(size, p.ds_numel - offset))  # the last rank's tail is padding
            if length:
                fragments.append(Fragment(names[p], offset, start, length))
            start += size
        assert start == flat.numel(), (start, flat.numel())
        found.append(Flat(flat, tuple(fragments), written=tuple(fragments)))
    return found


def _flats_of_stage_1_and_2(optimizer: Any, names: dict[Any, str]) -> list[Flat]:
    if hasattr(optimizer, "bf16_groups"):
        masters, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        weights = optimizer.bf16_groups_flat
    else:
        masters, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        weights = optimizer.bit16_groups_flat
    found = []
    for i, flat in enumerate(masters):
        process_group = optimizer.real_dp_process_group[i]
        size = weights[i].numel() // dist.get_world_size(group=process_group)
        low = dist.get_rank(group=process_group) * size
        storage = weights[i].untyped_storage().data_ptr()
        fragments = []
        for p in groups[i]:
            # Parameters are views of the group's flat weights: their offset there is the layout.
            assert p.data.untyped_storage().data_ptr() == storage, names[p]
            at = p.data.storage_offset() - weights[i].storage_offset()
            begin, end = max(at, low), min(at + p.numel(), low + size)
            if begin < end:
                fragments.append(Fragment(names[p], begin - at, begin - low, end - begin))
        found.append(Flat(flat, tuple(fragments), written=tuple(fragments)))
    return found


def _flats_of_stage_0(optimizer: Any, names: dict[Any, str]) -> list[Flat]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            whole = Fragment(names[p], 0, 0, p.numel())
            low, high = p.numel() * rank // world, p.numel() * (rank + 1) // world
            share = (Fragment(names[p], low, low, high - low),) if low < high else ()
            found.append(Flat(p, (whole,), written=share))
    return found


@contextlib.contextmanager
def writing_masters(engine: Any) -> Iterator[None]:
    """A block that changes master weights; afterwards the working weights are the rounded masters.

    A collective: all ranks enter and leave together.
    """
    optimizer, kind = engine.optimizer, _kind(engine)
    if kind == "stage 3":
        optimizer.checkpoint_event_prologue()  # releases gathered parameters
    with torch.no_grad():
        yield
        if kind == "stage 3":
            for i in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            optimizer.checkpoint_event_epilogue()  # gathers the persistent ones again
        elif kind != "stage 0":
            optimizer.update_lp_params()


def link_state(engine: Any) -> None:
    """After optimizer state was filled from outside: let DeepSpeed's own accessors see it."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def step_aside(engine: Any, loss: torch.Tensor) -> None:
    """Let the client optimizer step once on the gradient of `loss`, beside the training.

    Before the first micro-step of a training step only. The gradient is averaged over ranks, and
    neither clipped nor accumulated. Counters, schedule, loss scale and the norm that the engine
    reports are as before. Where gradients are not finite (in fp16) nothing happens. A collective.
    """
    optimizer, kept = engine.optimizer, {}
    engine.set_gradient_accumulation_boundary(True)
    for name in ("clip_grad", "overflow", "_global_grad_norm", "max_grad_norm"):
        if name in vars(optimizer):
            kept[name] = vars(optimizer)[name]
    if "clip_grad" in kept:
        optimizer.clip_grad = 0.0
    if hasattr(optimizer, "_update_scale"):
        optimizer._update_scale = lambda *overflow: None
    try:
        engine.backward(loss, scale_wrt_gas=False)
        optimizer.step()
        (engine if _kind(engine) == "stage 0" else optimizer).zero_grad()
    finally:
        vars(optimizer).update(kept)
        vars(optimizer).pop("_update_scale", None)
        engine._is_gradient_accumulation_boundary = None


@contextlib.contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """The model computes with the EMA weights inside the block; a collective on both ends.

    Masters and averages change places, shard by shard, so no rank ever needs a whole copy; changing
    back restores every bit.
    """
    _exchange(engine)
    try:
        yield
    finally:
        _exchange(engine)


def _exchange(engine: Any) -> None:
    state = client_optimizer(engine).state
    with writing_masters(engine):
        for flat in flats(engine):
            if "ema" in state[flat.tensor]:  # absent until the first step that was applied
                average, kept = state[flat.tensor]["ema"], flat.tensor.detach().clone()
                flat.tensor.copy_(average)
                average.copy_(kept)


def unsharded(engine: Any) -> dict[str, torch.Tensor]:
    """What no optimizer owns: buffers and frozen parameters, by name."""
    tensors = {name: b for name, b in engine.module.named_buffers()}
    tensors |= {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    return tensors


@contextlib.contextmanager
def gathered(tensor: torch.Tensor, *, write: bool = False) -> Iterator[None]:
    """The whole of a parameter that stage 3 has cut up; with `write`, rank 0's version stays."""
    if hasattr(tensor, "ds_id"):
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if write else None):
            yield
    else:
        yield


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """The fp16 loss scaler's counters; empty where nothing is scaled dynamically."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in _SCALER_FIELDS}


def load_loss_scaler_state(engine: Any, state: dict[str, float]) -> None:
    """Restore what `loss_scaler_state` returned, if this engine scales at all."""
    if loss_scaler_state(engine):
        for name in _SCALER_FIELDS:
            if name in state:
                setattr(engine.optimizer.loss_scaler, name, state[name])
