"""A source cut into units, the pieces of work that ranks take, and the reading of one image.

A listing's unit is `samples_per_shard` consecutive images, one shard. A tar is a unit by itself, as
many shards as it fills: so nobody has to know what lies in all the tars.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pydantic

from dit_ds import labels, remote, sources, transfer
from dit_ds.files import atomic_file
from dit_ds.labels import LabelKind
from dit_ds.sources import Listing, Tars

_IN_TARS = frozenset("jpg jpeg png webp".split())
# What the file system says of an image that is not there. Anything else (a disk that fails, a
# server that is gone) is no fault of the image, and must not leave it out.
_NO_IMAGE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_NUM_LOOKED_FOR = 100


class Rejection(ValueError):
    """Why an image cannot be part of the data set."""


class Extent(NamedTuple):
    """Bytes in a file."""

    file: str
    offset: int
    size: int


class Item(NamedTuple):
    """One image of a unit, before anybody looked at it."""

    key: str
    """In the shard: its number in the listing, or its tar's number and its place there."""
    name: str
    """As users know it: its path, or its tar and its key there."""
    image: str | Extent
    """Its file, or where it lies in a tar."""
    label: int | Extent
    fault: str = ""
    """Why there is nothing to read."""


@dataclass(frozen=True)
class Unit:
    """A piece of work, ready to be read."""

    number: int
    items: list[Item]
    work: int
    """Its share of all work, in units of `total_work`."""
    num_skipped: int = 0
    """Members of a tar that belong to no sample."""
    fetched: Path | None = None
    """A downloaded tar, to be removed when it has been read."""


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class ListedSource(_Frozen):
    """A listing as the plan keeps it; the images stand in `listing.jsonl`, one on each line."""

    kind: Literal["listing"] = "listing"
    root: str
    class_names: tuple[str, ...]
    num_images: int
    num_skipped: int
    sha256: str
    """Of `listing.jsonl`."""

    @classmethod
    def write(cls, listing: Listing, file: Path) -> ListedSource:
        """Write the listing and describe it."""
        digest = hashlib.sha256()
        with atomic_file(file) as lines:
            for entry in zip(listing.paths, listing.labels, strict=True):
                line = json.dumps(entry).encode() + b"\n"  # ASCII, whatever bytes the names hold
                digest.update(line)
                lines.write(line)
        return cls(
            root=listing.root,
            class_names=listing.class_names,
            num_images=len(listing.paths),
            num_skipped=listing.num_skipped,
            sha256=digest.hexdigest(),
        )


class TarSource(_Frozen):
    """Tars as the plan keeps them. class_names: None where the labels themselves are the names."""

    kind: Literal["tars"] = "tars"
    names: tuple[str, ...]
    num_bytes: tuple[int, ...]
    label: LabelKind
    class_names: tuple[str, ...] | None
    num_skipped: int = 0

    @classmethod
    def look(cls, tars: Tars, class_names: tuple[str, ...] | None, work: Path) -> TarSource:
        """Decide by the first tar how the images are labelled.

        Raises:
            ValueError: there are no labels, and it is not plain that none are meant to be.
        """
        first, keys = tars.names[0], ", ".join(labels.LABEL_KEYS)
        label, has_json = sources.label_kind(_local(work, 0, first, tars.num_bytes[0]), first)
        if label == "none":
            if class_names is None and has_json:
                raise ValueError(
                    f"images: no .json in {first} has a label (one of the keys {keys}); write the "
                    "labels so, or, for images without classes, give --classes with a file of one "
                    "line, the name for all"
                )
            if class_names is not None and len(class_names) > 1:
                raise ValueError(
                    f"classes: no sample of {first} has a label (.cls, or .json with one of "
                    f"{keys}); leave --classes out, or name one class for all"
                )
            class_names = class_names or labels.UNLABELLED
        return cls(names=tars.names, num_bytes=tars.num_bytes, label=label, class_names=class_names)


class ListedUnits:
    """The units of a listing, read from its file as they are needed.

    Raises:
        ValueError: the file is not the one that the plan was made with.
    """

    def __init__(self, source: ListedSource, file: Path, samples_per_shard: int) -> None:
        self._source, self._file, self._each = source, file, samples_per_shard
        self._starts: list[int] = []  # where each unit's lines begin
        digest, offset = hashlib.sha256(), 0
        try:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines):
                    if number % samples_per_shard == 0:
                        self._starts.append(offset)
                    digest.update(line)
                    offset += len(line)
        except OSError as error:
            raise ValueError(f"{file}: cannot be read on this host ({error.strerror})") from error
        if digest.hexdigest() != source.sha256:
            raise ValueError(
                f"{file}: was altered since the extraction began; remove the folder to begin anew"
            )
        self.total_work = source.num_images
        self.num_units = len(self._starts)

    def unit(self, number: int) -> Unit:
        """The images of one shard."""
        with open(self._file, "rb") as lines:
            lines.seek(self._starts[number])
            chosen = [json.loads(line) for line, _ in zip(lines, range(self._each), strict=False)]
        first = number * self._each
        items = [
            Item(f"{i:09d}", path, os.path.join(self._source.root, path), label)
            for i, (path, label) in enumerate(chosen, first)
        ]
        return Unit(number, items, self.work(number))

    def work(self, number: int) -> int:
        """Images in a unit."""
        return min(self._each, self.total_work - number * self._each)

    def check_seen(self) -> None:
        """Raise a ValueError if this host sees none of the first images: no mount, probably."""
        first = [str(item.image) for item in self.unit(0).items[:_NUM_LOOKED_FOR]]
        if not any(os.path.exists(path) for path in first):
            raise ValueError(
                f"images: none of the first {len(first)} is there on this host (first: "
                f"{first[0]}); mount their folder at the same place on all hosts, or correct the "
                "paths (in a list, a TAB stands between path and class)"
            )


class TarUnits:
    """The units of a set of tars; what lies at URLs is fetched into `work` first."""

    def __init__(self, source: TarSource, work: Path) -> None:
        self._source, self._work = source, work
        self.total_work = sum(source.num_bytes)
        self.num_units = len(source.names)

    def unit(self, number: int) -> Unit:
        """The samples of one tar."""
        name, num_bytes = self._source.names[number], self._source.num_bytes[number]
        path = _local(self._work, number, name, num_bytes)
        items, num_skipped = _index(path, number, name, self._source.label)
        fetched = path if remote.is_url(name) else None
        return Unit(number, items, self.work(number), num_skipped, fetched)

    def work(self, number: int) -> int:
        """Bytes of a unit."""
        return self._source.num_bytes[number]

    def check_seen(self) -> None:
        """Raise a ValueError if this host does not see the first tar as the plan does."""
        if not remote.is_url(self._source.names[0]):
            _local(self._work, 0, self._source.names[0], self._source.num_bytes[0])


def units(source: ListedSource | TarSource, out: Path, samples_per_shard: int) -> Units:
    """The units of a planned source. `out` holds `listing.jsonl`, and a folder `work`."""
    if isinstance(source, ListedSource):
        return ListedUnits(source, out / "listing.jsonl", samples_per_shard)
    return TarUnits(source, out / "work")


Units = ListedUnits | TarUnits


def _local(work: Path, number: int, name: str, num_bytes: int) -> Path:
    """A tar on this host's disk, fetched if it is at a URL and not there yet."""
    path = work / f"tar-{number:06d}.tar" if remote.is_url(name) else Path(name)
    if remote.is_url(name) and not path.exists():
        transfer.download(name, path, num_bytes=num_bytes)
    found = sources.size_of(str(path))
    if found != num_bytes:
        raise ValueError(
            f"images: {name} has {found} bytes, and had {num_bytes} when the extraction began; "
            "put the same file back, or remove the output folder to begin anew"
        )
    return path


def _index(path: Path, number: int, name: str, label: LabelKind) -> tuple[list[Item], int]:
    """A tar's samples, and how many members belong to none. A damaged tar ends with a fault."""
    items: list[Item] = []
    members: list[tuple[str, int, int]] = []  # suffix, offset and size, of one sample
    num_skipped, sample, fault = 0, "", ""

    def finish() -> None:
        if members:
            key = f"{number:06d}-{len(items):07d}"
            items.append(_sample(key, f"{name}/{sample}", str(path), members, label))

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, suffix = labels.split_name(member.name)
                if not key or not member.isfile():
                    num_skipped += not member.isdir()
                    continue
                if key != sample:
                    finish()
                    sample, members = key, []
                members.append((suffix, member.offset_data, member.size))
            end = tar.offset  # tarfile ends in silence where a header is cut or garbled
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                fault = "no end of the archive"
    except tarfile.TarError as error:
        fault = str(error)
    finish()
    if fault:
        nothing = Extent(str(path), 0, 0)
        fault = f"the tar is cut short or damaged here, and what follows is lost ({fault})"
        key = f"{number:06d}-{len(items):07d}"
        items.append(Item(key, name, nothing, nothing, fault))
    return items, num_skipped


def _sample(
    key: str, name: str, path: str, members: Sequence[tuple[str, int, int]], label: LabelKind
) -> Item:
    found = {suffix: Extent(path, offset, size) for suffix, offset, size in members}
    images = [suffix for suffix in found if suffix in _IN_TARS]
    nothing = Extent(path, 0, 0)
    fault = ""
    if len(found) < len(members):
        fault = "has several members of one suffix: its name stands for more than one sample"
    elif len(images) != 1:
        several = f"has several images ({', '.join(sorted(images))})"
        fault = several if images else f"has no image ({', '.join(sorted(_IN_TARS))})"
    elif label != "none" and label not in found:
        fault = f"has no label (.{label}, as the first labelled sample of the set has)"
    image = found[images[0]] if images else nothing
    return Item(key, name, image, 0 if label == "none" else found.get(label, nothing), fault)


class ItemReader:
    """Reads images and their labels as a source says."""

    def __init__(self, source: ListedSource | TarSource) -> None:
        self._label: LabelKind = source.label if isinstance(source, TarSource) else "none"
        self._class_ids = labels.class_ids(source.class_names)

    def read(self, item: Item) -> tuple[bytes, int]:
        """The image's file and its label; a `Rejection` if one of them is missing or no good."""
        if item.fault:
            raise Rejection(item.fault)
        image = _read(item.image)
        if isinstance(item.label, int):
            return image, item.label
        try:
            label = labels.parse_label(_read(item.label), self._label, self._class_ids)
        except ValueError as error:
            raise Rejection(str(error)) from error
        if label is None:
            raise Rejection(f"has a json with none of the keys {', '.join(labels.LABEL_KEYS)}")
        return image, label


def _read(place: str | Extent) -> bytes:
    path, offset, size = (place, 0, -1) if isinstance(place, str) else place
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would keep us waiting for ever
            raise Rejection("not a regular file")
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        if isinstance(place, str) and error.errno in _NO_IMAGE:
            raise Rejection(f"cannot be read: {error.strerror}") from error
        raise
    except ValueError as error:  # a NUL in a list's path
        raise Rejection(f"cannot be read: {error}") from error
    if size > len(content):
        raise Rejection("is cut short")
    return content
