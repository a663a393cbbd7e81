"""Going on from a checkpoint: which one, and its state into an engine of any topology.

Each rank reads the ranges that it needs from whichever files have them, so the number of ranks and
the ZeRO stage may differ from those of the save.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dit_ds import distributed, files, zero
from dit_ds.archive import (
    MASTER,
    Checkpoint,
    CheckpointError,
    Ranges,
    module_shapes,
    unsharded,
)
from dit_ds.checkpoint_index import Index
from dit_ds.retention import committed, latest


def newest(root: Path, *, strict: bool = False) -> Checkpoint | None:
    """The newest usable checkpoint, verified, the same on every rank; a collective.

    Rank 0 picks and tells the others, because shared file systems lag; ranks share the checksums.
    Newer ones than `latest` names are not looked at: they were never told of, or somebody went
    back. A damaged one, or a `latest` that names none, is told in a warning and the one before it
    is taken; `strict` refuses.

    Raises:
        RankError: there are checkpoints and none of them is usable, or `strict` and a damaged one.
    """
    names, newer, faults = _candidates(root)
    others = f"{', '.join(newer)} in {root}, newer than the one that `latest` names"
    for name in names:
        path = root / name
        try:
            if faults and strict:
                raise distributed.RankError(faults[0])
            checkpoint = _checked(path)
        except distributed.RankError as e:
            if distributed.broadcast_json(not path.is_dir()):
                return newest(root, strict=strict)  # removed by the training that saved it
            if strict:
                raise distributed.RankError(
                    f"{e}\n--strict goes on from no earlier checkpoint; bring the file back, or "
                    "leave --strict out"
                ) from e
            faults.append(str(e))
            continue
        if faults:
            distributed.warn_main(
                "damaged checkpoint skipped: " + "\n".join(faults) + "\n"
                f"the one of step {checkpoint.step} is used instead: {checkpoint.path}\n"
                "The next save of a training removes what is damaged; copy it first if it matters."
            )
        if newer:
            distributed.print_main(f"not used, and removed at the next save: {others}")
        return checkpoint
    if faults:
        raise distributed.RankError(
            f"no checkpoint in {root} is usable:\n"
            + "\n".join(faults)
            + "\n"
            + (
                f"to go on from {others}, write its name into `latest`"
                if newer
                else "move that folder away to start from the beginning"
            )
        )
    return None


def _checked(path: Path) -> Checkpoint:
    """A checkpoint whose every byte is right; a collective."""
    sizes: dict[str, int] = {}
    with distributed.agreed():
        if distributed.is_main():
            there = Checkpoint.open(path)
            there.check_headers()
            sizes = {name: file.num_bytes for name, file in there.index.files.items()}
            sizes["index.json"] = (path / "index.json").stat().st_size
    sizes = distributed.broadcast_json(sizes)
    with distributed.agreed():
        files.wait_until_seen(path, sizes)  # or a lag would be taken for damage
        checkpoint = Checkpoint.open(path)
        checkpoint.verify(distributed.rank(), distributed.world_size())
    return checkpoint


def _candidates(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of those that may be used, newest first; of newer ones; and what is wrong already."""
    names: list[str] = []
    newer: list[str] = []
    faults: list[str] = []
    with distributed.agreed():
        if distributed.is_main():
            last = latest(root)
            names = [path.name for path in committed(root)]
            if last is not None and last.name in names:
                newer = names[: names.index(last.name)]
                names = names[len(newer) :]
            elif os.path.lexists(root / "latest"):  # there was one
                faults.append(f"{root / 'latest'} names no checkpoint that is there")
    names, newer, faults = distributed.broadcast_json([names, newer, faults])
    return names, newer, faults


def load(engine: Any, checkpoint: Checkpoint) -> None:
    """Restore weights, optimizer state, buffers and counters; a collective.

    Raises:
        RankError: the checkpoint is of another model or optimizer; the engine is as it was.
    """
    index, held = checkpoint.index, {}
    optimizer = zero.client_optimizer(engine)
    hyper_parameters: list[dict[str, Any]] = []
    with distributed.agreed():
        _check_model(engine, checkpoint)
        _check_optimizer(engine, checkpoint)
        hyper_parameters = [
            _hyper_parameters(group, saved, checkpoint)
            for group, saved in zip(optimizer.param_groups, index.groups, strict=True)
        ]
        held = unsharded(checkpoint)
    with zero.writing_masters(engine), distributed.agreed():
        ranges = Ranges(checkpoint)
        for flat in zero.flats(engine):
            _fill(optimizer.state[flat.tensor], flat, ranges, index)
    zero.link_state(engine)
    for name, tensor in zero.unsharded(engine).items():
        with zero.gathered(tensor, write=True), torch.no_grad():
            tensor.copy_(held[name])
    for group, saved in zip(optimizer.param_groups, hyper_parameters, strict=True):
        group.update(saved)
    zero.load_loss_scaler_state(engine, index.loss_scaler)
    for name, value in index.engine:
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    distributed.barrier()


def _check_model(engine: Any, checkpoint: Checkpoint) -> None:
    there = {name: p.shape for name, p in checkpoint.index.parameters.items()}
    there |= module_shapes(checkpoint)
    here = zero.parameter_shapes(engine) | {
        name: list(getattr(t, "ds_shape", t.shape)) for name, t in zero.unsharded(engine).items()
    }
    differ = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
    if differ:
        name = differ[0]
        raise CheckpointError(
            f"{checkpoint.path} is of another model: {len(differ)} tensors differ, the first is "
            f"{name} with {there.get(name)} there and {here.get(name)} here"
        )


def _check_optimizer(engine: Any, checkpoint: Checkpoint) -> None:
    index = checkpoint.index
    optimizer: Any = zero.client_optimizer(engine)
    vectors, scalars = set(index.keys) - {MASTER}, set(optimizer.scalar_state)
    begun = bool(vectors)  # before the first step that was applied there is no state
    fits = vectors in (set(), set(optimizer.vector_state)) and all(
        set(p.scalars) == (scalars if begun else set()) for p in index.parameters.values()
    )
    if not fits or len(index.groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{checkpoint.path} is of another optimizer: it holds {', '.join(sorted(index.keys))} "
            f"in {len(index.groups)} groups, {type(optimizer).__name__} keeps "
            f"{', '.join(optimizer.vector_state)} in {len(optimizer.param_groups)}"
        )
    for flat in zero.flats(engine):  # each has one step counter
        scalars_there = [index.parameters[f.name].scalars for f in flat.fragments]
        if any(found != scalars_there[0] for found in scalars_there):
            raise CheckpointError(f"{checkpoint.path}: its parameters are not at one step")
    here = zero.loss_scaler_state(engine)
    if here and index.loss_scaler and here.keys() != index.loss_scaler.keys():
        raise CheckpointError(
            f"{checkpoint.path}: its loss scaler has {', '.join(index.loss_scaler)}, expected "
            f"{', '.join(here)}"
        )


def _fill(state: dict[str, Any], flat: zero.Flat, ranges: Ranges, index: Index) -> None:
    """Masters and state of one flat tensor; its padding becomes zero."""
    # What is padding alone takes the step of any parameter.
    name = flat.fragments[0].name if flat.fragments else min(index.parameters)
    for key in index.keys:
        if key != MASTER:
            state[key] = torch.zeros_like(flat.tensor, requires_grad=False)
        target = (flat.tensor if key == MASTER else state[key]).detach().view(-1)
        target.zero_()
        for f in flat.fragments:
            ranges.read(key, f.name, f.offset, target[f.start : f.start + f.length])
    for key, value in index.parameters[name].scalars.items():
        state[key] = torch.tensor(value, dtype=torch.float32, device=flat.tensor.device)


def _hyper_parameters(
    group: dict[str, Any], saved: dict[str, Any], checkpoint: Checkpoint
) -> dict[str, Any]:
    """What was saved of a param group, as far as this version of the optimizer knows it."""
    found = {}
    for key, value in saved.items():
        value = tuple(value) if isinstance(value, list) else value
        if num_numbers := _numbers(group.get(key)):  # nothing else changes in a run
            if _numbers(value) != num_numbers:
                raise CheckpointError(
                    f"{checkpoint.path}: {key} of its optimizer is {value!r:.100}, expected such "
                    f"as {group[key]}"
                )
            found[key] = value
    return found


def _numbers(value: Any) -> int:
    """How many numbers it is; 0 for anything else."""
    values = value if isinstance(value, tuple) else (value,)
    # Beyond these bounds an int is no float.
    usual = all(type(v) in (int, float) and -1e300 < v < 1e300 for v in values)
    return len(values) if usual else 0
