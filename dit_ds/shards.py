"""The format on disk: latents in tar shards.

A shard is a plain tar that any webdataset user can read: for each sample `KEY.moments.npy`
(float16, (2, 2C, h, w): the image and its mirror image, mean and log-variance, unscaled) and
`KEY.cls` (ASCII decimal). All samples take the same number of bytes, so to us the same file is a
strided array in a memory map.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import io
import mmap
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit_ds.files import atomic_file
from dit_ds.manifest import EXHAUSTED, REMEDY, Manifest, ShardError, ShardInfo, Store

_MOMENTS, _LABEL = ".moments.npy", ".cls"
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)  # what closes a tar


def npy_bytes(array: np.ndarray) -> bytes:
    """The npy file of an array."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
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
        self._write(_member(key + _MOMENTS, npy_bytes(np.ascontiguousarray(moments))))
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


class _Sizes:
    """Where things lie in the bytes of one sample, for moments of a shape (2C, h, w)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        npy = npy_bytes(np.zeros((2, *shape), np.float16))
        self.image = int(np.prod(shape)) * 2  # bytes of one image's moments; a sample has two
        self.npy_header = npy[: -2 * self.image]
        self.first = _BLOCK + len(self.npy_header)
        self.label = _BLOCK + len(npy) + -len(npy) % _BLOCK  # the header of the label's member
        self.sample = self.label + 2 * _BLOCK


_sizes = functools.lru_cache(_Sizes)


class _DamagedError(ShardError):
    """What was opened is damaged; the store may have another copy."""


class Reader(abc.ABC):
    """Reads samples of one shard by their rows in it.

    The file is mapped when it is first read, in each process by itself, so a reader can be forked
    and pickled. The first mapping checks size, checksum, layout, labels and that all values are
    finite; what is wrong raises a `ShardError`. `close` gives the map back; reading maps again.

    Args:
        store, info, manifest: the data set and the shard in it.
        checked: the content was checked before.
    """

    def __init__(
        self, store: Store, info: ShardInfo, manifest: Manifest, *, checked: bool = False
    ) -> None:
        self._store, self._info = store, info
        self._shape, self._num_classes = manifest.stored_shape, manifest.num_classes
        self._checked = checked
        self._bytes: memoryview | None = None

    @abc.abstractmethod
    def image(self, row: int, flip: int) -> memoryview:
        """The bytes of one image's values, `Manifest.stored_shape`; mirrored if `flip` is 1."""

    @abc.abstractmethod
    def label(self, row: int) -> int:
        """The class number of a row."""

    @abc.abstractmethod
    def key(self, row: int) -> str:
        """The key of a row."""

    def close(self) -> None:
        """Give the memory map back."""
        self._bytes = None

    def faults(self) -> Iterator[str]:
        """Everything that is wrong with the shard, a sentence each."""
        try:
            data = self._map()
        except ShardError as error:
            yield str(error)
            return
        yield from (f"{self._store.where(self._info.name)}: {f}" for f in self._wrong(data))

    @abc.abstractmethod
    def _wrong(self, data: memoryview) -> Iterator[str]:
        """What is wrong with the content, a phrase each."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}

    def _open(self) -> memoryview:
        try:
            data = self._sound()
        except _DamagedError:
            if not self._discard():
                raise
            data = self._sound()
        self._bytes = data
        return data

    def _sound(self) -> memoryview:
        data = self._map()
        if not self._checked:
            for fault in self._wrong(data):
                raise self._error(fault)
            self._checked = True
        return data

    def _discard(self) -> bool:
        return self._store.discard(self._info.name, self._info.sha256)

    def _map(self) -> memoryview:
        info = self._info
        with self._store.open(info.name, info.sha256, info.num_bytes) as file:
            size = os.fstat(file.fileno()).st_size
            if size != info.num_bytes:
                raise self._error(f"has {size} bytes, not the {info.num_bytes} it should")
            try:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError as error:
                if error.errno in EXHAUSTED:
                    raise
                raise self._error(f"cannot be read ({error.strerror})") from error

    def _error(self, fault: str) -> _DamagedError:
        return _DamagedError(f"{self._store.where(self._info.name)}: {fault}; {REMEDY}")


class ShardReader(Reader):
    """Reads one of our shards. See `Reader`."""

    def __init__(
        self, store: Store, info: ShardInfo, manifest: Manifest, *, checked: bool = False
    ) -> None:
        super().__init__(store, info, manifest, checked=checked)
        self._sizes = _sizes(manifest.moments_shape)

    def image(self, row: int, flip: int) -> memoryview:
        """The bytes of one image's moments, (2C, h, w) float16; mirrored if `flip` is 1."""
        sizes = self._sizes
        start = row * sizes.sample + sizes.first + flip * sizes.image
        return (self._bytes or self._open())[start : start + sizes.image]

    def label(self, row: int) -> int:
        """The class number of a row."""
        start = (row + 1) * self._sizes.sample - _BLOCK
        return int(bytes((self._bytes or self._open())[start : start + 20]).rstrip(b"\0"))

    def key(self, row: int) -> str:
        """The key of a row."""
        start = row * self._sizes.sample  # a tar header begins with the name
        name = bytes((self._bytes or self._open())[start : start + 100])
        return name.rstrip(b"\0").decode().removesuffix(_MOMENTS)

    def moments(self, rows: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """(n, 2C, h, w) float16 of `rows`, mirrored where `flips` is set. rows, flips: (n,)."""
        found = [self.image(int(r), int(f)) for r, f in zip(rows, flips, strict=True)]
        return np.frombuffer(b"".join(found), "<f2").reshape(-1, *self._shape)

    def _map(self) -> memoryview:
        data, info = super()._map(), self._info
        if len(data) != info.num_samples * self._sizes.sample + len(_END):
            raise self._error(
                f"{len(data)} bytes cannot hold {info.num_samples} samples of {self._shape} "
                "moments each"
            )
        return data

    def _wrong(self, data: memoryview) -> Iterator[str]:
        sizes, num = self._sizes, self._info.num_samples
        found = hashlib.sha256(data).hexdigest()
        if found != self._info.sha256:
            yield f"its content was altered: sha256 {found}, not {self._info.sha256}"
        blocks = np.frombuffer(data, np.uint8)[: num * sizes.sample].reshape(num, sizes.sample)
        header = np.frombuffer(sizes.npy_header, np.uint8)
        for row, block in enumerate(blocks):
            key = bytes(block[:100]).rstrip(b"\0").decode(errors="replace").removesuffix(_MOMENTS)
            names = (bytes(block[:100]), bytes(block[sizes.label : sizes.label + 100]))
            if names != tuple((key + end).encode().ljust(100, b"\0") for end in (_MOMENTS, _LABEL)):
                yield f"sample {row} is not KEY{_MOMENTS} followed by KEY{_LABEL}"
                continue
            if not np.array_equal(block[_BLOCK : sizes.first], header):
                yield f"sample {key} is not float16 moments of shape {self._shape}"
                continue
            digits = bytes(block[-_BLOCK:]).rstrip(b"\0")
            if not digits.isdigit() or int(digits) >= self._num_classes:
                yield f"sample {key} has the label {digits!r}, not one of 0-{self._num_classes - 1}"
            values = block[sizes.first : sizes.first + 2 * sizes.image].view("<u2")
            # Inf and NaN have all five exponent bits set; testing bits is 20 times np.isfinite.
            if (values & 0x7FFF).max() >= 0x7C00:
                yield f"sample {key} holds values that are not finite"
