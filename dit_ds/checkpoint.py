"""Saving checkpoints: each exists whole or not at all, and training does not wait for the disk.

    checkpoints/latest             name of the newest committed checkpoint
    checkpoints/step-00001000/     see `dit_ds.archive`
    checkpoints/.step-00002000.*   a save that is not committed yet

Every rank copies the ranges it holds of each parameter's float32 state (weights as `fp32`, moments,
EMA: whatever the optimizer keeps) into host memory, and training goes on while a thread writes
them. Once all ranks have written, the next step boundary commits: index, rename, `latest`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import math
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from dit_ds import __version__, distributed, files, zero
from dit_ds.archive import MASTER, MODULE, folder_name, gap
from dit_ds.checkpoint_index import FORMAT, Engine, File, Index, Parameter, Range, index_text
from dit_ds.parallel import in_background
from dit_ds.retention import Keep, committed, folder, remove, remove_leftovers, tidy
from dit_ds.staging import Staging, write

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPARE_BYTES = 1 << 24  # index, metrics and what else is written meanwhile


class DiskFull(distributed.RankError):
    """There is no room for a checkpoint; what was there before is untouched."""


@dataclass(frozen=True)
class Committed:
    """A checkpoint that was saved: what it took. pause_seconds: how long the training waited."""

    path: Path
    num_bytes: int
    pause_seconds: float
    write_seconds: float


@dataclass
class _Pending:
    """A checkpoint whose files are being written. content: index.json without what comes later."""

    step: int
    num_bytes: int
    aside: Path
    content: dict[str, Any]
    keys: list[str]
    scalars: dict[str, dict[str, float]]
    written: Future[dict[str, File]]
    began: float
    pause_seconds: float


class Checkpoints:
    """Saves the checkpoints of a run; all methods are collectives at a step boundary.

    Args:
        engine: the DeepSpeed engine.
        root: the run's `checkpoints` folder, which this run holds alone.
        keep: which checkpoints stay. None for all, and no `latest`: training goes on from none.
        keys: the state that is saved; the weights and all that the optimizer keeps, unless given.
    """

    def __init__(
        self, engine: Any, root: Path, keep: Keep | None, *, keys: tuple[str, ...] = ()
    ) -> None:
        self._engine, self._root, self._keep = engine, root, keep
        self._pending: _Pending | None = None
        self._tidying: Future[list[str]] | None = None
        self._known: dict[int, dict[str, float]] = {}  # metrics of committed ones, by step
        # Ranks of a run that was killed may still be writing: their files must not meet ours.
        self._token = distributed.broadcast_json(secrets.token_hex(4))
        self._num_saves = 0
        fragments = [f for flat in zero.flats(engine) for f in flat.written]
        ranges = {f.name: (f.offset, f.length) for f in fragments}
        self._ranges: list[dict[str, Range]] = distributed.gather_json(ranges)  # of each rank
        shapes = zero.parameter_shapes(engine)
        with distributed.agreed():
            if fault := gap({k: math.prod(v) for k, v in shapes.items()}, self._ranges):
                raise zero.unknown_layout(engine, fault)
        optimizer: Any = zero.client_optimizer(engine)
        self._keys = keys or (MASTER, *optimizer.vector_state)
        with distributed.agreed():
            if distributed.is_main():
                root.mkdir(parents=True, exist_ok=True)
                remove_leftovers(root)
            # Now, because a host with too little memory should not tell in an hour.
            sizes = {f"{k}/{f.name}": f.length for f in fragments for k in self._keys}
            self._staging = Staging(sizes)
        if keep is None:
            return
        # An old one goes only after a new one has come.
        num_more = max(1, keep.last + 1 - len(committed(root)))
        num_bytes = self.num_bytes() * num_more
        try:
            _check_room(root, num_bytes)
        except OSError as e:
            many = f"{num_more} checkpoints" if num_more > 1 else "a checkpoint"
            distributed.warn_main(f"there is no room for {many} now: {e}; {remedy(root)}")

    def num_bytes(self) -> int:
        """Size of all ranks' files; a collective."""
        return int(distributed.reduce_sum(torch.tensor([self._staging.num_bytes])).item())

    def save(self, *, step: int, about: dict[str, Any], metrics: dict[str, float]) -> None:
        """Copy the state into host memory and begin to write it, after the save before this one.

        Args:
            step: optimizer steps done; names the checkpoint.
            about: JSON that the index gives back (configuration, data set, position).
            metrics: what was measured at this step; those that are not finite are left out.

        Raises:
            DiskFull: there is no room for it.
            RankError: it, or the one before, cannot be written.
        """
        self.commit(wait=True)
        began = time.perf_counter()
        self._num_saves += 1
        aside = self._root / f".{folder_name(step)}.{self._token}-{self._num_saves}.tmp"
        tensors, scalars = _state(self._engine, self._keys)
        module = _module(self._engine)
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        with self._saving(step):
            if self._staging.sizes != sizes:  # no step was applied yet, so there is no state
                self._staging = Staging(sizes, memory=self._staging)
        staging = self._staging
        num_bytes = self.num_bytes() + len(module)
        with self._saving(step):
            if distributed.is_main():
                _check_room(self._root, num_bytes)
                aside.mkdir()
        staging.copy(tensors)
        content = _content(self._engine, step, about, metrics)

        name = f"rank-{distributed.rank():05d}.safetensors"

        def write_files() -> dict[str, File]:
            found = {name: staging.write(aside / name)}
            if module:
                found[MODULE] = write(memoryview(module), aside / MODULE)
            return found

        now = time.perf_counter()
        written = in_background(write_files)
        self._pending = _Pending(
            step, num_bytes, aside, content, _held(tensors), scalars, written, now, now - began
        )

    def commit(self, *, wait: bool = False) -> Committed | None:
        """Commit what was saved once all ranks have written it, else return None; or wait for them.

        Raises:
            DiskFull: the disk, or a quota, was full before it was written.
            RankError: it could not be written for another reason.
        """
        done = None
        if self._pending is not None:
            began = time.perf_counter()
            if wait:
                concurrent.futures.wait([self._pending.written])
            if distributed.reduce_max(0.0 if self._pending.written.done() else 1.0) == 0.0:
                pending, self._pending = self._pending, None
                path = self._commit(pending)
                now = time.perf_counter()
                done = Committed(
                    path,
                    pending.num_bytes,
                    pause_seconds=pending.pause_seconds + now - began,
                    write_seconds=now - pending.began,
                )
        if wait or (self._tidying is not None and self._tidying.done()):
            self._finish_tidying()
        return done

    def _commit(self, pending: _Pending) -> Path:
        path = folder(self._root, pending.step)
        with self._saving(pending.step):
            entries = {k: f.model_dump() for k, f in pending.written.result().items()}
        parts = distributed.gather_json([entries, pending.keys, pending.scalars])
        self._finish_tidying()
        with self._saving(pending.step):
            if distributed.is_main():
                index = self._index(pending, parts)
                sizes = {name: file.num_bytes for name, file in index.files.items()}
                files.wait_until_seen(pending.aside, sizes)
                files.write_atomically(pending.aside / "index.json", index_text(index))
                remove(path)  # a damaged one, or one never told of, or we would not be here
                pending.aside.rename(path)
                files.sync(self._root)
                if self._keep is not None:
                    files.write_atomically(self._root / "latest", path.name + "\n")
        keep = self._keep
        if keep is not None and distributed.is_main():
            self._known = {k: v for k, v in self._known.items() if k < pending.step}
            self._known[pending.step] = pending.content["metrics"]
            self._tidying = in_background(
                lambda: tidy(self._root, keep, newest=pending.step, known=self._known)
            )
        return path

    def _index(self, pending: _Pending, parts: list[Any]) -> Index:
        shapes = zero.parameter_shapes(self._engine)
        scalars = {name: found for _, _, part in parts for name, found in part.items()}
        entries: dict[str, Any] = {}
        for (part, _, _), ranges in zip(parts, self._ranges, strict=True):
            for name, entry in part.items():
                held = {} if name == MODULE else {k: tuple(r) for k, r in ranges.items()}
                entries[name] = File(**entry | {"ranges": held})
        return Index(
            **pending.content,
            keys=sorted({key for _, keys, _ in parts for key in keys}),
            parameters={
                name: Parameter(shape=shape, scalars=scalars.get(name, {}))
                for name, shape in shapes.items()
            },
            files=entries,
        )

    def _finish_tidying(self) -> None:
        """What was removed is told. What could not be is told too, and ends nothing."""
        if self._tidying is not None:
            try:
                if removed := self._tidying.result():
                    tqdm.write(f"removed {', '.join(removed)}")
            except Exception as e:  # on rank 0 alone, so it must not come further
                distributed.warn_main(f"not all old checkpoints could be removed: {e!r}")
            self._tidying = None

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """A part of a save that may fail on single ranks; all ranks raise then."""
        errors: list[Exception] = []
        try:
            with distributed.agreed():
                try:
                    yield
                except Exception as error:
                    errors.append(error)
                    raise
        except distributed.RankError as e:
            if distributed.is_main():
                for aside in self._root.glob(f".*.{self._token}-*.tmp"):
                    shutil.rmtree(aside, ignore_errors=True)
            full = all(isinstance(e, OSError) and e.errno in _FULL for e in errors)
            what = "snapshot" if self._keep is None else "checkpoint"
            told = (
                f"{what} {folder(self._root, step)} could not be written: {e}; older "
                f"{what}s are untouched"
            )
            if distributed.reduce_max(float(not full)):
                raise distributed.RankError(told) from e
            raise DiskFull(f"{told}; {remedy(self._root)}") from e


def _state(
    engine: Any, keys: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """This rank's part: vectors by `KEY/PARAMETER`, and scalars by parameter where it begins."""
    state = zero.client_optimizer(engine).state
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for flat in zero.flats(engine):
        mine = state.get(flat.tensor, {})
        vectors = {k: v for k, v in mine.items() if v.shape == flat.tensor.shape}
        vectors[MASTER] = flat.tensor
        for f in flat.written:
            if f.offset == 0:
                scalars[f.name] = {k: v.item() for k, v in mine.items() if k not in vectors}
            for key in filter(vectors.__contains__, keys):
                piece = vectors[key].detach().view(-1)[f.start : f.start + f.length]
                tensors[f"{key}/{f.name}"] = piece
    return tensors, scalars


def _held(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Which state the parameters have."""
    return sorted({name.partition("/")[0] for name in tensors})


def _module(engine: Any) -> bytes:
    """Buffers and frozen parameters as a safetensors file, on rank 0; a collective."""
    tensors = {}
    for name, tensor in zero.unsharded(engine).items():
        with zero.gathered(tensor):
            if distributed.is_main():
                tensors[name] = tensor.detach().to("cpu", copy=True)
    return safetensors_bytes(tensors) if distributed.is_main() else b""


def _content(
    engine: Any, step: int, about: dict[str, Any], metrics: dict[str, float]
) -> dict[str, Any]:
    groups = zero.client_optimizer(engine).param_groups
    return {
        "format": FORMAT,
        "dit_ds": __version__,
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "world_size": distributed.world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "engine": Engine(**{name: getattr(engine, name) for name in Engine.model_fields}),
        "loss_scaler": zero.loss_scaler_state(engine),
        "groups": [_json({k: v for k, v in g.items() if k != "params"}) for g in groups],
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "about": _json(about),
    }


def _json(tree: Any) -> Any:
    """A copy as JSON has it: what is saved later must not change with what goes on."""
    return json.loads(json.dumps(tree))


class _NoRoom(OSError):
    """As the system says it when a disk is full, before it is."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)

    def __str__(self) -> str:
        return self.args[1]


def _check_room(root: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    needed = num_bytes + _SPARE_BYTES
    if free < needed:
        needs, has = tqdm.format_sizeof(needed, "B"), tqdm.format_sizeof(free, "B")
        raise _NoRoom(f"{root} needs {needs} for it, and has {has}")


def remedy(root: Path) -> str:
    """What to do where there is no room."""
    return f"make room, as `python tools/checkpoint.py prune {root.parent} --keep 1` may do"
