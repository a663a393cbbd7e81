"""Shards that others wrote, read in place: plain tars with an index beside each.

`NAME.tar.index.npy` is int64 (n, 3): for each sample the byte where the tar header of its member
begins, the byte where its raw values begin, and its label. `dit_ds.adopt` makes it.
"""

from __future__ import annotations

import hashlib
import io
import math
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from dit_ds import arrays
from dit_ds.arrays import ArrayError
from dit_ds.labels import split_name
from dit_ds.manifest import Manifest, ShardError, ShardInfo, Store
from dit_ds.shards import Reader, ShardReader, npy_bytes

INDEX_SUFFIX = ".index.npy"
HEADER, VALUES, LABEL = 0, 1, 2  # columns of an index


def index_bytes(rows: np.ndarray) -> bytes:
    """The file of an index. rows: (n, 3) int64."""
    return npy_bytes(rows.astype("<i8"))


def open_reader(
    store: Store, info: ShardInfo, manifest: Manifest, *, checked: bool = False
) -> Reader:
    """The reader for the shards of a data set, ours or those of others. See `Reader`."""
    kind = ShardReader if manifest.layout is None else IndexedReader
    return kind(store, info, manifest, checked=checked)


class IndexedReader(Reader):
    """Reads a shard that others wrote. See `Reader`; there are no mirrored images."""

    def __init__(
        self, store: Store, info: ShardInfo, manifest: Manifest, *, checked: bool = False
    ) -> None:
        super().__init__(store, info, manifest, checked=checked)
        self._dtype = manifest.stored_dtype
        self._image = math.prod(self._shape) * self._dtype.itemsize
        self._rows: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """(n, 3) int64, the index."""
        if self._bytes is None:
            self._open()
        assert self._rows is not None
        return self._rows

    def image(self, row: int, flip: int) -> memoryview:
        """The bytes of one image's values."""
        assert flip == 0, "others' shards hold no mirrored images"
        data = self._bytes or self._open()
        start = self.rows[row, VALUES]
        return data[start : start + self._image]

    def label(self, row: int) -> int:
        """The class number of a row."""
        return int(self.rows[row, LABEL])

    def key(self, row: int) -> str:
        """The key of a row; a ShardError if the tar has none there."""
        return self._key(self._bytes or self._open(), self.rows[row])

    def close(self) -> None:
        """Give the memory map back."""
        self._bytes = self._rows = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rows": None}

    def _key(self, data: memoryview, row: np.ndarray) -> str:
        header, key = io.BytesIO(data[row[HEADER] : row[VALUES]]), ""
        try:
            # From the member's first header: a long name has blocks of its own before the last.
            with tarfile.open(fileobj=header, mode="r:") as tar:
                member = tar.next()
            key = split_name(member.name)[0] if member else ""
        except (tarfile.TarError, ValueError, OverflowError):
            pass
        if not key:
            raise self._error(f"no sample begins at byte {row[HEADER]}")
        return key

    def _discard(self) -> bool:
        info = self._info
        assert info.index_sha256 is not None
        other_index = self._store.discard(info.name + INDEX_SUFFIX, info.index_sha256)
        return super()._discard() or other_index

    def _map(self) -> memoryview:
        data = super()._map()
        self._rows = self._read_index(len(data))
        return data

    def _read_index(self, num_bytes: int) -> np.ndarray:
        """The index, whose rows lie in a shard of `num_bytes`."""
        info, name = self._info, self._info.name + INDEX_SUFFIX
        assert info.index_sha256 is not None
        with self._store.open(name, info.index_sha256) as file:
            content = file.read()
        found = hashlib.sha256(content).hexdigest()
        if found != info.index_sha256:
            raise self._error(
                f"its index {name} was altered: sha256 {found}, not {info.index_sha256}"
            )
        try:
            place = arrays.places("npy", memoryview(content))[""]
        except ArrayError as error:
            raise self._error(f"its index {name} {error}") from error
        shape = (info.num_samples, 3)
        if (place.dtype, place.shape) != ("<i8", shape):
            raise self._error(
                f"its index {name} is {place.dtype} of shape {place.shape}, not <i8 of {shape}"
            )
        rows = np.frombuffer(content, "<i8", offset=place.start).reshape(shape)
        headers, starts = rows[:, HEADER], rows[:, VALUES]
        past_end = starts > num_bytes - self._image  # in this order no index overflows
        if (rows < 0).any() or (headers >= starts).any() or past_end.any():
            raise self._error(f"its index {name} points out of the shard")
        return rows

    def _wrong(self, data: memoryview) -> Iterator[str]:
        found = hashlib.sha256(data).hexdigest()
        if found != self._info.sha256:
            yield f"its content was altered: sha256 {found}, not {self._info.sha256}"
        assert self._rows is not None
        count = math.prod(self._shape)
        for number, row in enumerate(self._rows):
            faults = []
            if row[LABEL] >= self._num_classes:
                faults.append(f"has the label {row[LABEL]}, not one of 0-{self._num_classes - 1}")
            if not np.isfinite(np.frombuffer(data, self._dtype, count, row[VALUES])).all():
                faults.append("holds values that are not finite")
            if faults:
                try:
                    key = self._key(data, row)
                except ShardError:
                    key = f"number {number}"
                yield from (f"sample {key} {fault}" for fault in faults)
