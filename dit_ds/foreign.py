"""Samples in tars that others wrote: where the latent lies, and its label.

Nothing is copied or unpickled, and nothing is left out in silence: what cannot be read in place is
told with the remedy, what nothing will read is counted.
"""

from __future__ import annotations

import math
import mmap
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dit_ds import arrays
from dit_ds.arrays import ArrayError
from dit_ds.labels import LABEL_KEYS, LabelKind, checked_label, parse_label, split_name

_DTYPES: dict[str, Literal["float16", "float32"]] = {"<f2": "float16", "<f4": "float32"}
_ARRAY_LABELS = (*LABEL_KEYS, "y")

Members = dict[str, tarfile.TarInfo]
"""Of one sample, by suffix."""


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in a tar.

    header, start: bytes where its member and its values begin. shape: (C or 2C, h, w).
    label: None where it has none. values: of this shape and dtype.
    """

    key: str
    header: int
    start: int
    shape: tuple[int, int, int]
    dtype: Literal["float16", "float32"]
    label: int | None
    values: np.ndarray


def mapped(path: Path) -> memoryview:
    """A file in a memory map; an ArrayError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ArrayError(f"cannot be read ({error})") from error


def grouped(data: memoryview) -> tuple[dict[str, Members], Counter[str], list[str]]:
    """Samples by key with their members, the number of members without key, and the tar's faults.

    `tarfile` takes a tar that was cut at a member for whole, so the end is looked at here.
    """
    samples: dict[str, Members] = {}
    ignored: Counter[str] = Counter()
    faults: list[str] = []
    try:
        with tarfile.open(fileobj=data.obj, mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                key, suffix = split_name(member.name)
                if member.isdir():
                    continue
                if not key:
                    ignored["members without key and suffix"] += 1
                elif not member.isreg() or member.issparse():
                    faults.append(f"{member.name} is a link or sparse; write it as a plain file")
                elif suffix in samples.setdefault(key, {}):
                    faults.append(f"{member.name} is there twice; keep one")
                else:
                    samples[key][suffix] = member
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        faults.append(f"is no sound uncompressed tar ({error}); copy or write it again")
        return samples, ignored, faults
    rest = np.frombuffer(data, np.uint8, offset=min(end, len(data)))
    if rest.any():
        faults.append(f"goes on with other bytes at byte {end}; copy or write it again")
    elif len(rest) < 2 * tarfile.BLOCKSIZE:
        faults.append(f"has no end-of-archive blocks at byte {end}: cut short; copy it again")
    return samples, ignored, faults


def read_sample(
    data: memoryview,
    key: str,
    members: Members,
    class_ids: Mapping[str, int] | None,
    ignored: Counter[str],
) -> Sample:
    """One sample; an ArrayError that names it if it cannot be read in place.

    class_ids: see `labels.class_ids`. ignored: counts what nothing will read.
    """
    try:
        by_kind: dict[str, list[str]] = {}
        for suffix in members:
            by_kind.setdefault(suffix.rsplit(".", 1)[-1], []).append(suffix)
        suffixes = [s for kind in arrays.KINDS for s in by_kind.pop(kind, [])]
        if len(suffixes) != 1:
            has = ", ".join(suffixes) if suffixes else f"only {', '.join(members)}"
            raise ArrayError(f"has not one npy, npz or safetensors member but {has}")
        member = members[suffixes[0]]
        content = data[member.offset_data : member.offset_data + member.size]
        found = arrays.places(suffixes[0].rsplit(".", 1)[-1], content)
        labels = {name: found.pop(name) for name in _ARRAY_LABELS if name in found}
        candidates = {n: _image_shape(p) for n, p in found.items() if len(_image_shape(p)) == 3}
        if len(candidates) != 1:
            has = ", ".join(f"{n} {p.dtype} {p.shape}".strip() for n, p in found.items())
            raise ArrayError(f"has not one array of shape (C, h, w) but {has or 'none'}")
        (name, shape) = candidates.popitem()
        place = found.pop(name)
        if place.dtype not in _DTYPES:
            raise ArrayError(
                f"is {place.dtype} of shape {place.shape}; only float16 and float32, "
                "little-endian, are read in place: write it as one of these"
            )
        label = None
        kinds: tuple[LabelKind, ...] = ("cls", "json")
        for kind in kinds:
            for suffix in by_kind.pop(kind, []):
                text = members[suffix]
                raw = bytes(data[text.offset_data : text.offset_data + text.size])
                label = parse_label(raw, kind, class_ids) if label is None else label
        if label is None and labels:
            label = checked_label(arrays.integer(content, next(iter(labels.values()))), class_ids)
        ignored.update(f".{suffix}" for others in by_kind.values() for suffix in others)
        ignored.update(f"array {name}" for name in found)
        return Sample(
            key,
            member.offset,
            member.offset_data + place.start,
            (shape[0], shape[1], shape[2]),
            _DTYPES[place.dtype],
            label,
            np.frombuffer(content, place.dtype, math.prod(shape), place.start).reshape(shape),
        )
    except ValueError as error:
        raise ArrayError(f"sample {key} {error}") from error


def _image_shape(place: arrays.Place) -> tuple[int, ...]:
    """The shape without a batch of one, as fast-DiT stores them."""
    shape = place.shape
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    return shape
