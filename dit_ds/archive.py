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
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

FORMAT = 2
MASTER = "fp32"
"""The key of the weights among a parameter's state; the others are the optimizer's names."""
MODULE = "module.safetensors"
CHUNK_BYTES = 1 << 25
"""Files are checksummed in pieces of this size, so that many hands can share the work."""

_MOST_INDEX_BYTES = 1 << 28
_THREADS = 4

Count = Annotated[int, Field(ge=0, lt=2**53)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[\w./+:-]{1,200}$")]
Range = tuple[Count, Annotated[int, Field(gt=0, lt=2**53)]]
"""First element, and how many."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or that does not fit this model."""


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )


class File(_Frozen):
    """A file of a checkpoint: its size, the sha256 of each chunk, and its ranges of parameters."""

    num_bytes: Count
    sha256: list[Digest]
    ranges: dict[Name, Range] = {}


class Parameter(_Frozen):
    """A trained parameter: its shape, and the state that is one number (the optimizer's step)."""

    shape: Annotated[list[Count], Field(max_length=16)]
    scalars: dict[Name, float] = {}

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Engine(_Frozen):
    """DeepSpeed's counters."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count


class Index(_Frozen):
    """index.json, but for its own checksum."""

    format: int
    dit_ds: Name
    saved_at: Name
    """UTC, ISO 8601."""
    step: Count
    world_size: Annotated[int, Field(gt=0)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    engine: Engine
    loss_scaler: dict[Name, float]
    groups: list[dict[str, pydantic.JsonValue]]
    """Hyper-parameters of the optimizer's groups."""
    keys: list[Name]
    """Which state every parameter has: `fp32`, `exp_avg`, `ema`, ..."""
    parameters: dict[Name, Parameter]
    metrics: dict[Name, float]
    """What was measured at this step, as `validation/loss`."""
    about: dict[str, pydantic.JsonValue]
    """What the saver handed over: configuration, data set, how to use the weights."""
    files: dict[Annotated[str, Field(pattern=r"^(rank-\d{5}|module)\.safetensors$")], File]


def checksum(tree: dict[str, Any]) -> str:
    """sha256 of everything in an index but this checksum itself."""
    content = {key: value for key, value in tree.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def index_text(index: Index) -> str:
    """The content of index.json."""
    tree = index.model_dump(mode="json")
    return json.dumps(tree | {"sha256": checksum(tree)})


def chunks_of(data: memoryview) -> list[memoryview]:
    """The pieces of a file that are checksummed each."""
    return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its index."""

    path: Path
    index: Index

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Read and check the index; the files it names are not touched.

        Raises:
            CheckpointError: not a checkpoint, of another format, or not whole.
        """
        file = path / "index.json"
        try:
            if _size(file) > _MOST_INDEX_BYTES:
                raise CheckpointError(f"{file}: larger than any index is")
            tree = json.loads(file.read_bytes())
            if not isinstance(tree, dict) or "format" not in tree:
                raise CheckpointError(f"{file} is damaged (no index of a checkpoint)")
            if tree["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: checkpoint format {tree['format']!r:.20}, this version reads "
                    f"{FORMAT}; use the dit_ds that wrote it ({tree.get('dit_ds')!r:.20})"
                )
            if tree.pop("sha256", None) != checksum(tree):
                raise CheckpointError(f"{file}: altered since it was written (checksum)")
            checkpoint = Checkpoint(path, Index.model_validate_json(json.dumps(tree)))
        except CheckpointError:
            raise
        except OSError as e:
            raise CheckpointError(f"{file} cannot be read ({e.strerror})") from e
        except pydantic.ValidationError as e:
            fault = e.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise CheckpointError(f"{file} is damaged ({where!r:.200}: {fault['msg']:.200})") from e
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{file} is damaged ({e!s:.200})") from e
        checkpoint._check_ranges()
        return checkpoint

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.index.step

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(file.num_bytes for file in self.index.files.values())

    def _check_ranges(self) -> None:
        parameters = self.index.parameters
        ranges: dict[str, list[Range]] = {name: [] for name in parameters}
        for file, entry in self.index.files.items():
            for name, found in entry.ranges.items():
                if name not in ranges:
                    raise CheckpointError(f"{self.path}/{file}: has ranges of an unknown {name}")
                ranges[name].append(found)
        for name, parameter in parameters.items():
            at = 0
            for offset, length in sorted(ranges[name]):
                if offset != at:
                    raise CheckpointError(f"{self.path}: {name} has a gap or an overlap at {at}")
                at += length
            if at != parameter.numel:
                raise CheckpointError(f"{self.path}: {name} holds {at} of {parameter.numel} values")
        if parameters and MASTER not in self.index.keys:
            raise CheckpointError(f"{self.path}: holds no weights ({MASTER})")
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
            with _opened(path) as file:
                held = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                if name == MODULE:
                    continue  # compared with the module, by whoever loads it
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
        names = sorted(self.index.files)
        self.check_headers(names[rank::world_size])
        jobs = []
        for name in names:
            entry = self.index.files[name]
            if len(entry.sha256) != -(-entry.num_bytes // CHUNK_BYTES):
                raise CheckpointError(f"{self.path}/{name}: has {len(entry.sha256)} checksums")
            jobs += [(name, i) for i in range(len(entry.sha256))]
        jobs = jobs[rank::world_size]
        with ThreadPoolExecutor(_THREADS) as pool:
            checks = pool.map(self._check_chunk, *zip(*jobs, strict=True)) if jobs else ()
            told = f"checking {self.path.name}"
            # Only on a terminal, and only by one.
            disable = None if rank == 0 else True
            for _ in tqdm(checks, told, total=len(jobs), disable=disable, leave=False):
                pass

    def _check_chunk(self, name: str, chunk: int) -> None:
        path = self.path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                data = os.pread(fd, CHUNK_BYTES, chunk * CHUNK_BYTES)
            finally:
                os.close(fd)
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read ({e.strerror})") from e
        if hashlib.sha256(data).hexdigest() != self.index.files[name].sha256[chunk]:
            first = chunk * CHUNK_BYTES
            raise CheckpointError(
                f"{path}: altered since it was written (checksum of bytes {first} to "
                f"{first + len(data)})"
            )


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
                    self._open[file] = safe_open(self._checkpoint.path / file, "pt")
                piece = self._open[file].get_slice(f"{key}/{name}")[low - start : high - start]
                out[low - offset : high - offset].copy_(piece)

    def whole(self, key: str, name: str) -> torch.Tensor:
        """One parameter's `key`, float32, on the CPU."""
        parameter = self._checkpoint.index.parameters[name]
        out = torch.empty(parameter.numel, dtype=torch.float32)
        self.read(key, name, 0, out)
        return out.view(parameter.shape)


def unsharded(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Buffers and frozen parameters of a checkpoint."""
    with _opened(checkpoint.path / MODULE) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _size(path: Path) -> int:
    """Bytes of a regular file, and of nothing else: a pipe or a device would never end."""
    try:
        found = os.lstat(path)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror})") from e
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a plain file")
    return found.st_size


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is damaged ({e!s:.200})") from e
