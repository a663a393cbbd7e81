"""Checkpoints: each exists whole or not at all, holds no pickle, and loads in any topology.

    checkpoints/latest                           name of the newest committed checkpoint
    checkpoints/step-00001000/index.json         what is where, counters, configuration, checksums
    checkpoints/step-00001000/rank-00000.safetensors   `KEY/PARAMETER`: the range rank 0 holds
    checkpoints/step-00001000/module.safetensors       buffers and frozen parameters

Every rank writes the ranges it holds of each parameter's float32 state (weights as `fp32`, moments,
EMA: whatever the optimizer keeps), aside; all agree; rename; then `latest`. A load reads the ranges
that a rank needs from whichever files have them, so the number of ranks and the ZeRO stage may
differ from those of the save.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dit_ds import __version__, distributed, files, zero
from dit_ds.archive import FORMAT, MASTER, Checkpoint, CheckpointError, Ranges, checksum, unsharded

# ------------------------------------------------------------------------------------------ save


def save(engine: Any, root: Path, *, step: int, about: dict[str, Any], keep: int) -> Path:
    """Write and commit a checkpoint at a step boundary; a collective.

    Args:
        engine: the DeepSpeed engine.
        root: the run's `checkpoints` folder.
        step: optimizer steps done; names the checkpoint.
        about: JSON that `Checkpoint.about` gives back (configuration, data set, position).
        keep: number of newest checkpoints that stay.

    Raises:
        RankError: writing failed somewhere (a full disk); what was there before is untouched.
    """
    path = root / f"step-{step:08d}"
    aside = root / f".{path.name}.tmp"
    with distributed.agreed():
        if distributed.is_main():
            for killed in root.glob(".step-*.tmp"):
                shutil.rmtree(killed, ignore_errors=True)
            aside.mkdir(parents=True)
    try:
        part: dict[str, Any] = {}
        with distributed.agreed():
            part = _write_rank(engine, aside / f"rank-{distributed.rank():05d}.safetensors")
        with distributed.agreed():
            module = _write_module(engine, aside / "module.safetensors")
        parts = distributed.gather_json(part)
        with distributed.agreed():
            if distributed.is_main():
                index = _index(engine, step, about) | {"files": {p.pop("name"): p for p in parts}}
                index["files"]["module.safetensors"] = module
                index["sha256"] = checksum(index)
                files.write_atomically(aside / "index.json", json.dumps(index))
                _remove(path)  # a damaged one, or we would not be here
                aside.rename(path)
                files.sync(root)
                files.write_atomically(root / "latest", path.name + "\n")
    except distributed.RankError as e:
        if distributed.is_main():
            shutil.rmtree(aside, ignore_errors=True)
        raise distributed.RankError(
            f"checkpoint {path} could not be written: {e}; older checkpoints are untouched"
        ) from e
    if distributed.is_main():
        names = [p.name for p in _committed(root)]
        at = names.index(path.name)
        # Those above were damaged or never told of, or training would have gone on from them.
        for name in names[:at] + names[at + keep :]:
            _remove(root / name)
    return path


def _remove(path: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves nothing that looks like one."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _write_rank(engine: Any, path: Path) -> dict[str, Any]:
    """This rank's ranges; returns the entry of the index that says which they are."""
    state = zero.client_optimizer(engine).state
    tensors: dict[str, torch.Tensor] = {}
    fragments: dict[str, list[int]] = {}
    scalars: dict[str, dict[str, float]] = {}
    for flat in zero.flats(engine):
        mine = state.get(flat.tensor, {})
        vectors = {k: v for k, v in mine.items() if v.shape == flat.tensor.shape}
        vectors[MASTER] = flat.tensor
        for f in flat.fragments if flat.owned else ():
            fragments[f.name] = [f.offset, f.length]
            scalars[f.name] = {k: v.item() for k, v in mine.items() if k not in vectors}
            for key, vector in vectors.items():
                piece = vector.detach().view(-1)[f.start : f.start + f.length]
                tensors[f"{key}/{f.name}"] = piece.to("cpu", copy=True)
    _save_tensors(tensors, path)
    return {"name": path.name, **_fingerprint(path), "fragments": fragments, "scalars": scalars}


def _write_module(engine: Any, path: Path) -> dict[str, Any]:
    """Buffers and frozen parameters, once; gathering them is a collective."""
    tensors = {}
    for name, tensor in zero.unsharded(engine).items():
        with zero.gathered(tensor):
            tensors[name] = tensor.detach().to("cpu", copy=True)
    if not distributed.is_main():
        return {}
    _save_tensors(tensors, path)
    return _fingerprint(path)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
        files.usual_permissions(path)
        files.sync(path)
    except SafetensorError as e:  # how safetensors tells of a full disk
        raise OSError(f"{path}: {e}") from e


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _index(engine: Any, step: int, about: dict[str, Any]) -> dict[str, Any]:
    groups = zero.client_optimizer(engine).param_groups
    return {
        "format": FORMAT,
        "dit_ds": __version__,
        "step": step,
        "world_size": distributed.world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "engine": {name: getattr(engine, name) for name in _COUNTERS},
        "loss_scaler": zero.loss_scaler_state(engine),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in groups],
        "parameters": zero.parameter_shapes(engine),
        "about": about,
    }


_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def _committed(root: Path) -> list[Path]:
    """Folders of committed checkpoints, newest first."""
    return sorted((p for p in root.glob("step-*") if (p / "index.json").is_file()), reverse=True)


# ------------------------------------------------------------------------------------------ load


def newest(root: Path) -> Checkpoint | None:
    """The newest usable checkpoint, verified, the same on every rank; a collective.

    Rank 0 picks and tells the others, because shared file systems lag; ranks share the checksums. A
    damaged checkpoint is named in a warning and the one before it is taken.

    Raises:
        RankError: there are checkpoints and none of them is usable.
    """
    names: list[str] = []
    with distributed.agreed():
        if distributed.is_main():
            names, latest = [p.name for p in _committed(root)], root / "latest"
            if latest.is_file() and (last := latest.read_text(errors="replace").strip()) in names:
                names = names[names.index(last) :]  # newer ones were renamed but never told of
    faults = []
    for name in distributed.broadcast_json(names):
        try:
            with distributed.agreed():
                checkpoint = Checkpoint.open(root / name)
                # Ranks share the work: each reads some of the files.
                rank, world = distributed.rank(), distributed.world_size()
                checkpoint.verify(sorted(checkpoint.index["files"])[rank::world])
            return checkpoint
        except distributed.RankError as e:
            faults.append(str(e))
            distributed.print_main(f"WARNING: damaged checkpoint skipped: {e}")
    if faults:
        raise distributed.RankError(
            f"no checkpoint in {root} is usable:\n" + "\n".join(faults) + "\n"
            "move that folder away to start from the beginning"
        )
    return None


def load(engine: Any, checkpoint: Checkpoint) -> None:
    """Restore weights, optimizer state, buffers and counters; a collective.

    Raises:
        RankError: the checkpoint is of another model.
    """
    with distributed.agreed():
        _check_model(zero.parameter_shapes(engine), checkpoint)
    with zero.writing_masters(engine), distributed.agreed():
        ranges = Ranges(checkpoint)
        for flat in zero.flats(engine):
            _fill(zero.client_optimizer(engine).state[flat.tensor], flat, ranges)
    zero.link_state(engine)
    held = unsharded(checkpoint)
    for name, tensor in zero.unsharded(engine).items():
        with zero.gathered(tensor, write=True), torch.no_grad():
            tensor.copy_(held[name])
    for group, saved in zip(
        zero.client_optimizer(engine).param_groups, checkpoint.index["groups"], strict=True
    ):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    zero.load_loss_scaler_state(engine, checkpoint.index["loss_scaler"])
    for name in _COUNTERS:
        setattr(engine, name, checkpoint.index["engine"][name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    distributed.barrier()


def _check_model(shapes: dict[str, list[int]], checkpoint: Checkpoint) -> None:
    differ = sorted(
        name for name in shapes.keys() | checkpoint.shapes.keys()
        if shapes.get(name) != checkpoint.shapes.get(name)
    )  # fmt: skip
    if differ:
        name = differ[0]
        raise CheckpointError(
            f"{checkpoint.path} is of another model: {len(differ)} parameters differ, the first is "
            f"{name} with {checkpoint.shapes.get(name)} there and {shapes.get(name)} here"
        )


def _fill(state: dict[str, Any], flat: zero.Flat, ranges: Ranges) -> None:
    """Masters and state of one flat tensor; its padding becomes zero."""
    names = [f.name for f in flat.fragments] or sorted(ranges.scalars)[:1]
    scalars = ranges.scalars[names[0]]
    # One flat tensor has one step counter, so its parameters must agree on theirs.
    if any(ranges.scalars[name] != scalars for name in names):
        raise CheckpointError("parameters of one partition disagree on their step counters")
    for key in ranges.keys(names[0]):
        if key != MASTER:
            state[key] = torch.zeros_like(flat.tensor, requires_grad=False)
        target = (flat.tensor if key == MASTER else state[key]).detach().view(-1)
        target.zero_()
        for f in flat.fragments:
            ranges.read(key, f.name, f.offset, target[f.start : f.start + f.length])
    for key, value in scalars.items():
        state[key] = torch.tensor(value, dtype=torch.float32, device=flat.tensor.device)
