"""The format on disk: latents in tar shards beside a `manifest.json`.

A shard is a plain tar that any webdataset user can read: for each sample `KEY.moments.npy`
(float16, (2, 2C, h, w): the image and its mirror image, mean and log-variance, unscaled) and
`KEY.cls` (ASCII decimal). All samples take the same number of bytes, so to us the same file is a
strided array, and reading any n samples is one gather from a memory map.

The manifest is written last and atomically: a dataset exists or it does not. A sample's id is its
position in the manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from dit_ds.files import atomic_file

MANIFEST_NAME = "manifest.json"
_MOMENTS, _LABEL = ".moments.npy", ".cls"
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)  # what closes a tar
_REMEDY = "copy it again, or delete the folder and run tools/precompute_latents.py again"


class ShardError(ValueError):
    """A shard that is missing, cut short or altered; names the file, the fault and the remedy."""


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class ShardInfo(_Frozen):
    """One shard as the manifest knows it. `name` lies in the manifest's folder."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9_][\w.-]*$")  # never a path out of the folder
    num_samples: pydantic.PositiveInt
    num_bytes: pydantic.PositiveInt
    sha256: str = pydantic.Field(pattern=r"^[0-9a-f]{64}$")


class VaeInfo(_Frozen):
    """Which VAE made the moments: the name it was asked for by, and `latents.vae_hash`."""

    name: str
    sha256: str


class Manifest(_Frozen):
    """What a dataset is. latent_shape: (C, h, w)."""

    format_version: Literal[1] = 1
    created_by: str
    class_names: tuple[str, ...] = pydantic.Field(min_length=1)
    image_size: pydantic.PositiveInt
    latent_shape: tuple[pydantic.PositiveInt, pydantic.PositiveInt, pydantic.PositiveInt]
    dtype: Literal["float16"] = "float16"
    scaling_factor: pydantic.FiniteFloat
    shift_factor: pydantic.FiniteFloat = 0.0
    vae: VaeInfo
    shards: tuple[ShardInfo, ...] = pydantic.Field(min_length=1)

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are positions in `class_names`."""
        return len(self.class_names)

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(2C, h, w), the shape of one image's moments."""
        channels, high, wide = self.latent_shape
        return (2 * channels, high, wide)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what training sees: same data, same order, wherever it lies."""
        content = self.model_dump(mode="json", exclude={"created_by", "vae", "shards"})
        content["vae"] = self.vae.sha256
        content["shards"] = [[s.num_samples, s.num_bytes, s.sha256] for s in self.shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """The manifest of a folder; a ValueError if there is none or it is not one of ours."""
        path = Path(directory) / MANIFEST_NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); make the dataset with "
                f"tools/precompute_latents.py --out {directory}"
            ) from error
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ValueError(
                f"{path}: not a manifest of this version: {where}: {first['msg']}; make the "
                "dataset again with tools/precompute_latents.py"
            ) from error

    def save(self, directory: str | Path) -> None:
        """Write `manifest.json`, atomically, when all shards lie there."""
        with atomic_file(Path(directory) / MANIFEST_NAME) as file:
            file.write(self.model_dump_json(indent=1).encode() + b"\n")


def _npy(moments: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, moments, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _member(name: str, content: bytes) -> bytes:
    """One file of a tar: a header that holds no time and no owner, the content, the padding."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % _BLOCK)


class ShardWriter:
    """Writes one shard aside; it is there under its name when the `with` block ends well.

    ``with ShardWriter(path) as shard: shard.add(...)``, then `shard.info`.
    """

    info: ShardInfo

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._aside = atomic_file(self._path)
        self._sha256 = hashlib.sha256()
        self._num_samples = self._num_bytes = 0

    def __enter__(self) -> ShardWriter:
        self._file = self._aside.__enter__()
        return self

    def add(self, key: str, moments: np.ndarray, label: int) -> None:
        """Append a sample. moments: (2, 2C, h, w) float16, one shape for the whole shard."""
        assert "." not in key and 0 < len(key) <= 80, key  # webdataset splits keys at dots
        assert moments.dtype == np.float16 and moments.ndim == 4, (moments.dtype, moments.shape)
        self._write(_member(key + _MOMENTS, _npy(np.ascontiguousarray(moments))))
        self._write(_member(key + _LABEL, b"%d" % label))
        self._num_samples += 1

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._num_bytes += len(data)

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._write(_END)
        self._aside.__exit__(*error)
        if error[0] is None:
            self.info = ShardInfo(
                name=self._path.name,
                num_samples=self._num_samples,
                num_bytes=self._num_bytes,
                sha256=self._sha256.hexdigest(),
            )


def check_files(directory: str | Path, manifest: Manifest) -> None:
    """Raise one `ShardError` if shards are missing or have another size; reads no contents."""
    try:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory)}
    except OSError as error:
        raise ShardError(f"{directory}: cannot be read ({error.strerror}); {_REMEDY}") from error
    faults = []
    for shard in manifest.shards:
        if shard.name not in sizes:
            faults.append(f"{shard.name} is missing")
        elif sizes[shard.name] != shard.num_bytes:
            faults.append(f"{shard.name} has {sizes[shard.name]} bytes, not {shard.num_bytes}")
    if faults:
        shown = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        raise ShardError(
            f"{directory}: {len(faults)} of {len(manifest.shards)} shards are damaged: {shown}; "
            f"{_REMEDY}"
        )


class ShardReader:
    """Reads samples of one shard by their rows in it.

    The file is mapped when it is first read, in each process by itself, so a reader can be forked
    and pickled. The first mapping checks size, checksum, layout, labels and that all values are
    finite; what is wrong raises a `ShardError`. `close` gives the map back; reading maps again.
    """

    def __init__(self, directory: str | Path, info: ShardInfo, manifest: Manifest) -> None:
        self._path = Path(directory) / info.name
        self._info = info
        self._shape = manifest.moments_shape
        self._num_classes = manifest.num_classes
        self._checked = False
        self._blocks: np.ndarray | None = None  # (num_samples, bytes of a sample), on the map
        npy = _npy(np.zeros((2, *self._shape), np.float16))
        self._half = 2 * math.prod(self._shape)  # bytes of one image's moments; a sample has two
        self._npy_header = npy[: -2 * self._half]
        self._data = slice(_BLOCK + len(self._npy_header), _BLOCK + len(npy))  # of a sample's bytes
        self._sample_bytes = _BLOCK + len(npy) + -len(npy) % _BLOCK + 2 * _BLOCK

    def moments(self, rows: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """(n, 2C, h, w) float16 of `rows`, mirrored where `flips` is set. rows, flips: (n,)."""
        halves = self._open()[:, self._data].view(f"V{self._half}")  # (num_samples, 2)
        taken = halves[rows, np.asarray(flips, np.intp)]  # a void is copied whole: a memcpy each
        return taken.view("<f2").reshape(-1, *self._shape)

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """(n,) int64 class numbers of `rows`."""
        return self._open()[rows, -_BLOCK:].view(f"S{_BLOCK}")[:, 0].astype(np.int64)

    def keys(self, rows: np.ndarray) -> list[str]:
        """The keys of `rows`."""
        names = self._open()[rows, :100].view("S100")[:, 0]  # a tar header begins with the name
        return [name.decode().removesuffix(_MOMENTS) for name in names]

    def close(self) -> None:
        """Give the memory map back."""
        self._blocks = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": None}

    def _open(self) -> np.ndarray:
        if self._blocks is None:
            blocks = self._map()
            if not self._checked:
                self._check(blocks)
                self._checked = True
            self._blocks = blocks
        return self._blocks

    def _map(self) -> np.ndarray:
        try:
            with open(self._path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != self._info.num_bytes:
                    raise self._error(f"has {size} bytes, not the {self._info.num_bytes} it should")
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        shape = (self._info.num_samples, self._sample_bytes)
        if self._info.num_bytes != shape[0] * shape[1] + len(_END):
            raise self._error(
                f"{size} bytes cannot hold {shape[0]} samples of {self._shape} moments each"
            )
        return np.ndarray(shape, np.uint8, buffer)

    def _check(self, blocks: np.ndarray) -> None:
        found = hashlib.sha256(blocks.data)
        found.update(_END)
        if found.hexdigest() != self._info.sha256:
            raise self._error(
                f"its content was altered: sha256 {found.hexdigest()}, not {self._info.sha256}"
            )
        label = self._sample_bytes - 2 * _BLOCK
        header = np.frombuffer(self._npy_header, np.uint8)
        for row, block in enumerate(blocks):
            key = bytes(block[:100]).rstrip(b"\0").decode(errors="replace").removesuffix(_MOMENTS)
            names = (bytes(block[:100]), bytes(block[label : label + 100]))
            if names != tuple((key + end).encode().ljust(100, b"\0") for end in (_MOMENTS, _LABEL)):
                raise self._error(f"sample {row} is not KEY{_MOMENTS} followed by KEY{_LABEL}")
            if not np.array_equal(block[_BLOCK : self._data.start], header):
                raise self._error(f"sample {key} is not float16 moments of shape {self._shape}")
            digits = bytes(block[-_BLOCK:]).rstrip(b"\0")
            if not digits.isdigit() or int(digits) >= self._num_classes:
                raise self._error(
                    f"sample {key} has the label {digits!r}, not one of 0-{self._num_classes - 1}"
                )
            # Inf and NaN have all five exponent bits set; testing bits is 20 times np.isfinite.
            if (block[self._data].view("<u2") & 0x7FFF).max() >= 0x7C00:
                raise self._error(f"sample {key} holds values that are not finite")

    def _error(self, fault: str) -> ShardError:
        return ShardError(f"{self._path}: {fault}; {_REMEDY}")
