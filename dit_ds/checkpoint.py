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

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dit_ds import __version__, distributed, files, zero

FORMAT = 1
_MASTER = "fp32"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or that does not fit this model."""


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
                files.write_atomically(aside / "index.json", json.dumps(index))
                shutil.rmtree(path, ignore_errors=True)  # a damaged one, or we would not be here
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
        for old in _committed(root)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def _write_rank(engine: Any, path: Path) -> dict[str, Any]:
    """This rank's ranges; returns the entry of the index that says which they are."""
    state = zero.client_optimizer(engine).state
    tensors: dict[str, torch.Tensor] = {}
    fragments: dict[str, list[int]] = {}
    scalars: dict[str, dict[str, float]] = {}
    for flat in zero.flats(engine):
        mine = state.get(flat.tensor, {})
        vectors = {k: v for k, v in mine.items() if v.shape == flat.tensor.shape}
        vectors[_MASTER] = flat.tensor
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


# ------------------------------------------------------------------------------------------ read


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its index."""

    path: Path
    index: dict[str, Any]

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Read and check the index; the files it names are not touched.

        Raises:
            CheckpointError: not a checkpoint, of another format, or not whole.
        """
        try:
            index = json.loads((path / "index.json").read_text())
            if index["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: checkpoint format {index['format']}, this version reads {FORMAT}"
                )
            checkpoint = Checkpoint(path, index)
            checkpoint._check_ranges()
        except OSError as e:
            raise CheckpointError(f"{path}/index.json cannot be read ({e.strerror})") from e
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
            raise CheckpointError(f"{path}/index.json is damaged ({e!r})") from e
        return checkpoint

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.index["step"])

    @property
    def about(self) -> dict[str, Any]:
        """What the saver handed to `save`."""
        return self.index["about"]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of every trained parameter."""
        return self.index["parameters"]

    def _check_ranges(self) -> None:
        ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in self.shapes}
        for file, entry in self.index["files"].items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{self.path}/index.json names a strange file {file!r}")
            for name, (offset, length) in entry.get("fragments", {}).items():
                ranges[name].append((offset, length))
        for name, shape in self.shapes.items():
            at = 0
            for offset, length in sorted(ranges[name]):
                if offset != at:
                    raise CheckpointError(f"{self.path}: {name} has a gap or an overlap at {at}")
                at += length
            if at != math.prod(shape):
                raise CheckpointError(
                    f"{self.path}: {name} holds {at} of {math.prod(shape)} values"
                )

    def verify(self, names: Iterable[str]) -> None:
        """Compare size and checksum of these files with the index.

        Raises:
            CheckpointError: a file is missing, cut short or altered.
        """
        for name in names:
            path, entry = self.path / name, self.index["files"][name]
            try:
                found = path.stat().st_size
                if found != entry["bytes"]:
                    raise CheckpointError(f"{path}: {found} bytes, {entry['bytes']} were written")
                if files.sha256(path) != entry["sha256"]:
                    raise CheckpointError(f"{path}: altered since it was written (checksum)")
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e


class Ranges:
    """Reads any range of any parameter's state, from whichever files hold it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path
        self._open: dict[str, Any] = {}
        self._where: dict[str, list[tuple[int, int, str]]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        for file, entry in checkpoint.index["files"].items():
            for name, (offset, length) in entry.get("fragments", {}).items():
                self._where.setdefault(name, []).append((offset, length, file))
            self.scalars.update(entry.get("scalars", {}))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._path / name, "pt")
        return self._open[name]

    def keys(self, name: str) -> list[str]:
        """Which state a parameter has: `fp32`, `exp_avg`, `ema`, ..."""
        held = self._file(self._where[name][0][2]).keys()
        return sorted(key for key, _, rest in (k.partition("/") for k in held) if rest == name)

    def read(self, key: str, name: str, offset: int, out: torch.Tensor) -> None:
        """Fill the 1-D `out` with elements from `offset` on of one parameter's `key`."""
        stop = offset + out.numel()
        for start, length, file in self._where[name]:
            low, high = max(offset, start), min(stop, start + length)
            if low < high:
                piece = self._file(file).get_slice(f"{key}/{name}")[low - start : high - start]
                out[low - offset : high - offset].copy_(piece)

    def whole(self, key: str, name: str, shape: list[int]) -> torch.Tensor:
        """One parameter's `key`, float32, on the CPU."""
        out = torch.empty(math.prod(shape), dtype=torch.float32)
        self.read(key, name, 0, out)
        return out.view(shape)


def unsharded(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Buffers and frozen parameters of a checkpoint."""
    with safe_open(checkpoint.path / "module.safetensors", "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict


def newest(root: Path) -> Checkpoint | None:
    """The newest usable checkpoint, verified, the same on every rank; a collective.

    Rank 0 picks and tells the others, because shared file systems lag; ranks share the checksums. A
    damaged checkpoint is named in a warning and the one before it is taken.

    Raises:
        RankError: there are checkpoints and none of them is usable.
    """
    names = [p.name for p in _committed(root)]
    if (root / "latest").is_file() and (last := (root / "latest").read_text().strip()) in names:
        names = names[names.index(last) :]  # newer ones were renamed but never told of
    faults = []
    for name in distributed.broadcast_json(names):
        try:
            with distributed.agreed():
                checkpoint = Checkpoint.open(root / name)
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


# ------------------------------------------------------------------------------------------ load


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
        if key != _MASTER:
            state[key] = torch.zeros_like(flat.tensor, requires_grad=False)
        target = (flat.tensor if key == _MASTER else state[key]).detach().view(-1)
        target.zero_()
        for f in flat.fragments:
            ranges.read(key, f.name, f.offset, target[f.start : f.start + f.length])
    for key, value in scalars.items():
        state[key] = torch.tensor(value, dtype=torch.float32, device=flat.tensor.device)
