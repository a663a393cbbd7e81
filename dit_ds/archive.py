"""What a committed checkpoint holds, and where: its index, and ranges of parameters in its files.

    step-00001000/index.json                what is where, counters, configuration, checksums
    step-00001000/rank-00000.safetensors    `KEY/PARAMETER`: the range that rank 0 held
    step-00001000/module.safetensors        buffers and frozen parameters

No engine and no process group is needed to read one. Nothing is unpickled, and nothing is believed:
the index must have its checksum and its types, its ranges must add up to the parameters, its files
must lie in the folder and hold exactly what it says. So a checkpoint made by a stranger can at
worst be refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from dit_ds.checkpoint_index import FORMAT, MOST_BYTES, NAME, Index, Range, checksum, fault_of

MASTER = "fp32"
"""The key of the weights among a parameter's state; the others are the optimizer's names."""
MODULE = "module.safetensors"
CHUNK_BYTES = 1 << 25
"""Files are checksummed in pieces of this size, so that many hands can share the work."""

_THREADS = 4
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""What buffers may be; torch cannot compute with all that safetensors can hold."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or that does not fit this model."""


class Unreadable(CheckpointError):
    """A checkpoint that may be whole: of another version, or the system does not give it now."""


def folder_name(step: int) -> str:
    """The folder of the checkpoint of a step."""
    return f"step-{step:08d}"


def chunks_of(data: memoryview) -> list[memoryview]:
    """The pieces of a file that are checksummed each."""
    return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]


def gap(sizes: dict[str, int], parts: Sequence[dict[str, Range]]) -> str:
    """How the parts fail to hold every value of every parameter once; empty if they do."""
    ranges: dict[str, list[Range]] = {name: [] for name in sizes}
    for part in parts:
        for name, found in part.items():
            if name not in ranges:
                return f"it has ranges of an unknown {name}"
            ranges[name].append(found)
    for name, size in sizes.items():
        at = 0
        for offset, length in sorted(ranges[name]):
            if offset != at:
                return f"{name} has a gap or an overlap at {at}"
            at += length
        if at != size:
            return f"{name} holds {at} of {size} values"
    return ""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its index."""

    path: Path
    index: Index

    @staticmethod
    def open(path: Path, *, holding: str = MASTER) -> Checkpoint:
        """Read and check the index; the files it names are not touched.

        Args:
            path: the folder.
            holding: the state without which it would be of no use.

        Raises:
            CheckpointError: not a checkpoint, of another format, or not whole.
        """
        file = path / "index.json"
        try:
            if _size(file) > MOST_BYTES:
                raise CheckpointError(f"{file}: larger than any index is")
            tree = json.loads(file.read_bytes())
            if not isinstance(tree, dict) or "format" not in tree:
                raise CheckpointError(f"{file} is damaged (no index of a checkpoint)")
            if tree["format"] != FORMAT:
                raise Unreadable(
                    f"{path}: checkpoint format {tree['format']!r:.20}, this version reads "
                    f"{FORMAT}; use the dit_ds that wrote it ({tree.get('dit_ds')!r:.20})"
                )
            if tree.pop("sha256", None) != checksum(tree):
                raise CheckpointError(f"{file}: altered since it was written (checksum)")
            checkpoint = Checkpoint(path, Index.model_validate_json(json.dumps(tree)))
        except CheckpointError:
            raise
        except OSError as e:
            raise _unreadable(file, e) from e
        except pydantic.ValidationError as e:
            raise CheckpointError(f"{file} is damaged ({fault_of(e)})") from e
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{file} is damaged ({e!s:.200})") from e
        if path.name != folder_name(checkpoint.step):  # what stays is decided by steps
            raise CheckpointError(f"{file} is that of step {checkpoint.step}")
        checkpoint._check_ranges(holding)
        return checkpoint

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.index.step

    def _check_ranges(self, holding: str) -> None:
        parameters = self.index.parameters
        sizes = {name: parameter.numel for name, parameter in parameters.items()}
        if fault := gap(sizes, [file.ranges for file in self.index.files.values()]):
            raise CheckpointError(f"{self.path}: {fault}")
        if parameters and holding not in self.index.keys:
            raise CheckpointError(f"{self.path}: holds no weights ({holding})")
        if MODULE not in self.index.files:
            raise CheckpointError(f"{self.path}: holds no {MODULE}")

    def check_headers(self, files: Sequence[str] | None = None) -> None:
        """Compare what each file says it holds with the index; reads headers only.

        Raises:
            CheckpointError: a file is missing, cut short, or of other content.
        """
        for name in self.index.files if files is None else files:
            entry, path = self.index.files[name], self.path / name
            if (found := _size(path)) != entry.num_bytes:
                raise CheckpointError(f"{path}: {found} bytes, {entry.num_bytes} were written")
            if name == MODULE:
                module_shapes(self)  # compared with the module, by whoever loads it
                continue
            with _opened(path) as file:
                held = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                expected = len(self.index.keys) * len(entry.ranges)
                if len(held) != expected:  # keys times ranges is larger than any index
                    raise CheckpointError(f"{path}: {len(held)} tensors, {expected} were written")
                wanted = {
                    f"{key}/{parameter}": length
                    for parameter, (_, length) in entry.ranges.items()
                    for key in self.index.keys
                }
                if held.keys() != wanted.keys():
                    odd = min(held.keys() ^ wanted.keys())
                    raise CheckpointError(f"{path}: {odd!r:.200} is in the file or the index alone")
                for key, piece in held.items():
                    shape, dtype = piece.get_shape(), piece.get_dtype()
                    if shape != [wanted[key]] or dtype != "F32":
                        raise CheckpointError(
                            f"{path}: {key} is {dtype} {shape}, expected F32 [{wanted[key]}]"
                        )

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare headers and the checksum of every byte; ranks share the work.

        Raises:
            CheckpointError: a file is missing, cut short, altered, or of other content.
        """
        for fault in self.faults(rank, world_size):
            raise fault

    def faults(self, rank: int = 0, world_size: int = 1) -> Iterator[CheckpointError]:
        """Every fault that `verify` would raise, one by one."""
        names, jobs, bad = sorted(self.index.files), [], set()
        for i, name in enumerate(names):
            entry = self.index.files[name]
            try:
                if i % world_size == rank:
                    self.check_headers([name])
                if len(entry.sha256) != -(-entry.num_bytes // CHUNK_BYTES):
                    raise CheckpointError(f"{self.path}/{name}: has {len(entry.sha256)} checksums")
            except CheckpointError as fault:
                bad.add(name)
                yield fault
            jobs += [(name, i) for i in range(len(entry.sha256))]
        jobs = [job for job in jobs[rank::world_size] if job[0] not in bad]
        with ThreadPoolExecutor(_THREADS) as pool:
            checks = pool.map(self._check_chunk, *zip(*jobs, strict=True)) if jobs else ()
            told, disable = f"checking {self.path.name}", rank > 0 or None  # None: on a terminal
            try:
                for found in tqdm(checks, told, total=len(jobs), disable=disable, leave=False):
                    if found is not None:
                        yield found
            finally:
                pool.shutdown(cancel_futures=True)  # who has seen enough does not wait for the rest

    def _check_chunk(self, name: str, chunk: int) -> CheckpointError | None:
        path = self.path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                data = os.pread(fd, CHUNK_BYTES, chunk * CHUNK_BYTES)
            finally:
                os.close(fd)
        except OSError as e:
            return _unreadable(path, e)
        if hashlib.sha256(data).hexdigest() != self.index.files[name].sha256[chunk]:
            first = chunk * CHUNK_BYTES
            return CheckpointError(
                f"{path}: altered since it was written (checksum of bytes {first} to "
                f"{first + len(data)})"
            )
        return None


class Ranges:
    """Reads any range of any parameter's state, from whichever files hold it.

    For a checkpoint whose headers were checked.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, Any] = {}
        self._where: dict[str, list[tuple[int, int, str]]] = {}
        for file, entry in checkpoint.index.files.items():
            for name, (offset, length) in entry.ranges.items():
                self._where.setdefault(name, []).append((offset, length, file))

    def read(self, key: str, name: str, offset: int, out: torch.Tensor) -> None:
        """Fill the 1-D `out` with elements from `offset` on of one parameter's `key`."""
        stop = offset + out.numel()
        for start, length, file in self._where[name]:
            low, high = max(offset, start), min(stop, start + length)
            if low < high:
                if file not in self._open:
                    # Not with torch, which cannot map a file larger than the memory.
                    self._open[file] = safe_open(self._checkpoint.path / file, "np")
                piece = self._open[file].get_slice(f"{key}/{name}")[low - start : high - start]
                out[low - offset : high - offset].copy_(torch.from_numpy(piece))

    def whole(self, key: str, name: str) -> torch.Tensor:
        """One parameter's `key`, float32, on the CPU."""
        parameter = self._checkpoint.index.parameters[name]
        out = torch.empty(parameter.numel, dtype=torch.float32)
        self.read(key, name, 0, out)
        return out.view(parameter.shape)


def module_shapes(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Shapes of what `unsharded` reads, from the header alone.

    Raises:
        CheckpointError: the file is damaged, or holds what no module has.
    """
    path, shapes = checkpoint.path / MODULE, {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            piece = file.get_slice(name)
            shapes[name] = piece.get_shape()
            if not re.fullmatch(NAME, name) or piece.get_dtype() not in _DTYPES:
                raise CheckpointError(f"{path}: {name!r:.200} is {piece.get_dtype()}, or no name")
            if name in checkpoint.index.parameters:
                raise CheckpointError(f"{path}: {name} is a trained parameter")
    return shapes


def unsharded(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Buffers and frozen parameters of a checkpoint."""
    with _opened(checkpoint.path / MODULE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    kind = CheckpointError if isinstance(error, FileNotFoundError) else Unreadable
    return kind(f"{path} cannot be read ({error.strerror})")


def _size(path: Path) -> int:
    """Bytes of a regular file, and of nothing else: a pipe or a device would never end."""
    try:
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise _unreadable(path, e) from e
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a plain file")
    return found.st_size


@contextlib.contextmanager
def _opened(path: Path, framework: str = "np") -> Iterator[Any]:
    # For its header alone not with torch, which cannot map a file larger than the memory.
    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is damaged ({str(e)!r:.200})") from e
