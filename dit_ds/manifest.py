"""What a data set is: its manifest, and the folder it lies in.

The manifest is written last and atomically: a data set exists or it does not. A sample's id is its
position in the manifest. Shards are reached through a `Store`: a `Folder` here, or a URL
(`dit_ds.remote`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
import pydantic

from dit_ds.files import atomic_file

MANIFEST_NAME = "manifest.json"
REMEDY = "copy it again, or make the data set again"

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of this machine, which say nothing of the file."""


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
    index_sha256: str | None = pydantic.Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Of `NAME.index.npy`, which says where the samples lie in a shard that others wrote."""


class VaeInfo(_Frozen):
    """Which VAE made the moments: the name it was asked for by, and `latents.vae_hash`."""

    name: str
    sha256: str


class Layout(_Frozen):
    """How a sample is stored in shards that others wrote: one array of `dtype`, not mirrored."""

    values: Literal["moments", "latents", "scaled_latents"]
    """Mean and log-variance (2C, h, w); or one latent (C, h, w), unscaled, or scaled and shifted as
    the model sees it."""
    dtype: Literal["float16", "float32"]


class Statistics(_Frozen):
    """Mean and standard deviation of each channel of the unscaled latents, over the data set."""

    mean: tuple[pydantic.FiniteFloat, ...]
    std: tuple[pydantic.FiniteFloat, ...]


def image_shape(image_size: int, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(H, W) in pixels of images whose shorter side has `image_size`, of latents (C, h, w)."""
    _, high, wide = latent_shape
    shorter = min(high, wide)
    return image_size * high // shorter, image_size * wide // shorter


class Manifest(_Frozen):
    """What a dataset is. latent_shape: (C, h, w). image_size: pixels of the shorter side."""

    format_version: Literal[1] = 1
    created_by: str
    class_names: tuple[str, ...] = pydantic.Field(min_length=1)
    image_size: pydantic.PositiveInt
    latent_shape: tuple[pydantic.PositiveInt, pydantic.PositiveInt, pydantic.PositiveInt]
    dtype: Literal["float16"] = "float16"
    scaling_factor: pydantic.FiniteFloat
    shift_factor: pydantic.FiniteFloat = 0.0
    vae: VaeInfo
    statistics: Statistics | None = None
    layout: Layout | None = None
    """None for our own shards."""
    shards: tuple[ShardInfo, ...] = pydantic.Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _shards_fit_the_layout(self) -> Manifest:
        for shard in self.shards:
            if (shard.index_sha256 is None) != (self.layout is None):
                raise ValueError(
                    f"shard {shard.name} has no index_sha256, which a layout asks for"
                    if self.layout
                    else f"shard {shard.name} has an index_sha256, but the manifest no layout"
                )
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are positions in `class_names`."""
        return len(self.class_names)

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) of the images in pixels."""
        return image_shape(self.image_size, self.latent_shape)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(2C, h, w), the shape of one image's moments."""
        channels, high, wide = self.latent_shape
        return (2 * channels, high, wide)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of one image's values in a shard: that of the moments, or of the latents."""
        latents = self.layout is not None and self.layout.values != "moments"
        return self.latent_shape if latents else self.moments_shape

    @property
    def stored_dtype(self) -> np.dtype[np.floating]:
        """Type of the values in a shard, little-endian."""
        return np.dtype(self.layout.dtype if self.layout else self.dtype).newbyteorder("<")

    @property
    def mirrored(self) -> bool:
        """Whether each sample holds the moments of the mirrored image too."""
        return self.layout is None

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what training sees: same data, same order, wherever it lies."""
        others = {"created_by", "vae", "shards", "statistics", "layout"}
        content = self.model_dump(mode="json", exclude=others)
        content["vae"] = self.vae.sha256
        content["shards"] = [[s.num_samples, s.num_bytes, s.sha256] for s in self.shards]
        if self.layout is not None:
            content["layout"] = self.layout.model_dump()
            content["indices"] = [s.index_sha256 for s in self.shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """The manifest in the bytes of a file; a ValueError that names `where` if it is none."""
        try:
            return cls.model_validate_json(data)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ValueError(
                f"{where}: not a manifest of this version: {place}: {first['msg']}; restore it "
                "from a copy, or make the dataset again with tools/precompute_latents.py"
            ) from error

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """The manifest of a folder; a ValueError if there is none or it is not one of ours."""
        path = Path(directory) / MANIFEST_NAME
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            remedy = f"make the dataset with tools/precompute_latents.py --out {directory}"
            if not Path(directory).is_dir():
                remedy = "there is no such folder; correct the path, or " + remedy
            elif (Path(directory) / "plan.json").exists():
                remedy = "the extraction is not finished; run the same command again"
            raise ValueError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error

    def save(self, directory: str | Path) -> None:
        """Write `manifest.json`, atomically, when all shards lie there."""
        with atomic_file(Path(directory) / MANIFEST_NAME) as file:
            file.write(self.model_dump_json(indent=1, exclude_none=True).encode() + b"\n")


class Store(Protocol):
    """Where a data set lies, and how its files are reached. A store may be forked and pickled."""

    def manifest(self) -> Manifest:
        """The data set's manifest. Raises a ValueError if there is none."""

    def check(self, manifest: Manifest) -> None:
        """Raise a ShardError where it can be told without reading them that shards are damaged."""

    def where(self, name: str) -> str:
        """A file's full name, for people."""

    def open(self, name: str, sha256: str, num_bytes: int | None = None) -> BinaryIO:
        """A file of the data set, of `num_bytes` if that is known, open on this machine's disk.

        Raises a ShardError that names the file if it cannot be had. Its content may be damaged.
        """

    def discard(self, name: str, sha256: str) -> bool:
        """Called when what `open` gave was damaged; whether opening again gives another copy."""


class Folder:
    """A data set in a folder of this machine or of a shared file system."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def manifest(self) -> Manifest:
        """The manifest in the folder."""
        return Manifest.load(self.path)

    def check(self, manifest: Manifest) -> None:
        """See `check_files`."""
        check_files(self.path, manifest)

    def where(self, name: str) -> str:
        """The path."""
        return str(self.path / name)

    def open(self, name: str, sha256: str, num_bytes: int | None = None) -> BinaryIO:
        """The file itself; its checksum is the reader's business."""
        try:
            return open(self.path / name, "rb")
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            raise ShardError(
                f"{self.path / name}: cannot be read ({error.strerror}); {REMEDY}"
            ) from error

    def discard(self, name: str, sha256: str) -> bool:
        """There is no other copy."""
        return False


def check_files(directory: str | Path, manifest: Manifest) -> None:
    """Raise one `ShardError` if shards are missing or have another size; reads no contents."""
    try:
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory)}
    except OSError as error:
        raise ShardError(f"{directory}: cannot be read ({error.strerror}); {REMEDY}") from error
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
            f"{REMEDY}"
        )
