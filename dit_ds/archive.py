"""What a committed checkpoint holds, and where: its index, and ranges of parameters in its files.

No engine and no process group is needed to read one. Nothing is unpickled, and an index is believed
only if its checksum is right, its ranges add up, and its files stay in their folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dit_ds import files

FORMAT = 1
MASTER = "fp32"
"""The key of the weights among a parameter's state; the others are the optimizer's names."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, or that does not fit this model."""


def checksum(index: dict[str, Any]) -> str:
    """sha256 of everything in an index but this checksum itself."""
    content = {key: value for key, value in index.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
            if index["sha256"] != checksum(index):
                raise CheckpointError(f"{path}/index.json: altered since it was written (checksum)")
            checkpoint = Checkpoint(path, index)
            checkpoint._check_ranges()
        except CheckpointError:
            raise
        except OSError as e:
            raise CheckpointError(f"{path}/index.json cannot be read ({e.strerror})") from e
        except (KeyError, TypeError, AttributeError, ValueError) as e:
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
