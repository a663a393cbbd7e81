"""The manifest for shards that others wrote: plain webdataset tars of latents, read in place.

Each sample has one `npy`, `npz` or `safetensors` member with one array, a latent (C, h, w) or
moments (2C, h, w), and a label: an integer in `cls`, or in `json` under "label", "cls" or "class",
or beside the array under "label", "cls", "class" or "y". A set without labels has one class. The
tars are never changed; an index is written beside each (`dit_ds.indexed`), the manifest last.

The first sample tells the shape, the type and whether there are labels; all others must agree.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic

import dit_ds
from dit_ds import parallel
from dit_ds.arrays import ArrayError
from dit_ds.files import atomic_file
from dit_ds.foreign import Sample, grouped, mapped, read_sample
from dit_ds.indexed import INDEX_SUFFIX, index_bytes
from dit_ds.labels import UNLABELLED, class_ids
from dit_ds.manifest import MANIFEST_NAME, Layout, Manifest, ShardInfo, Statistics, VaeInfo

Values = Literal["moments", "latents", "scaled_latents"]

_PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SHOWN = 10


@dataclass(frozen=True)
class Vae:
    """What is known of the VAE that made the latents.

    scaling_factor, shift_factor: the model sees (latent - shift) * scale. channels: C, if known.
    """

    scaling_factor: float
    shift_factor: float = 0.0
    channels: int | None = None
    info: VaeInfo = VaeInfo(name="unknown", sha256="unknown")


@dataclass(frozen=True)
class Adopted:
    """The manifest, and the number of members and arrays, by kind, that nothing will read."""

    manifest: Manifest
    ignored: dict[str, int]


def first_sample(directory: str | Path, class_names: Sequence[str] | None = None) -> Sample:
    """The first sample of the tars in a folder that can be read; a ValueError if there is none."""
    faults = []
    for path in _tars(Path(directory)):
        try:
            data = mapped(path)
            samples, _, wrong = grouped(data)
            for key, members in samples.items():
                return read_sample(data, key, members, class_ids(class_names), Counter())
            raise ArrayError(wrong[0] if wrong else "holds no samples")
        except ArrayError as error:
            faults.append(f"{path.name}: {error}")
    raise _refusal(directory, faults, len(faults))


def settle(first: Sample, values: Values | None, vae: Vae) -> Values:
    """What the values are: as told, or as the VAE's number of channels says.

    Raises:
        ValueError: it was not told and nothing decides it, or it contradicts shape or VAE.
    """
    stored, channels = first.shape[0], vae.channels
    if values is None and channels is not None and stored == 2 * channels:
        return "moments"
    found = f"sample {first.key} is of shape {first.shape}"
    if channels is not None and stored not in (channels, 2 * channels):
        raise ValueError(
            f"{found}, which the VAE, whose latents have {channels} channels, did not make: those "
            f"are of {channels} channels, moments of {2 * channels}; give the VAE that did"
        )
    if values is None:
        std = float(first.values.astype(np.float64).std())
        could = "" if channels or stored % 2 else f" or moments of {stored // 2} channels"
        raise ValueError(
            f"values is not told: {found}: latents{could}; give one: moments, latents (as the VAE "
            "gives them) or scaled_latents (times the scaling factor). The standard deviation here "
            f"is {std:.3g}; that of scaled latents is about 1, that of this VAE's own about "
            f"{1 / vae.scaling_factor:.3g}"
        )
    if channels is not None and (stored == 2 * channels) != (values == "moments"):
        meant = "moments" if stored == 2 * channels else "latents or scaled_latents"
        raise ValueError(
            f"values={values}: {found}, and the VAE's latents have {channels} channels; these are "
            f"{meant}"
        )
    if values == "moments" and stored % 2:
        raise ValueError(f"values=moments: {found}; moments have an even number of channels")
    return values


def index(
    directory: str | Path,
    *,
    vae: Vae,
    image_size: int,
    values: Values | None = None,
    class_names: Sequence[str] | None = None,
    workers: int | None = None,
) -> Adopted:
    """Write an index beside each `*.tar` of a folder, then `manifest.json`.

    image_size: shorter side of the images in pixels. values: see `settle`. class_names: by label;
    "0", "1" and so on if None. workers: processes; default: one per core.

    Raises:
        ValueError: tars that cannot be read in place, with the first faults by tar and key; a
            manifest that is there; settings that do not fit.
    """
    directory = Path(directory)
    if (directory / MANIFEST_NAME).exists():
        raise ValueError(
            f"{directory / MANIFEST_NAME} exists: this is a data set already; to index it anew "
            "delete that file"
        )
    paths = _tars(directory)
    first = first_sample(directory, class_names)
    values = settle(first, values, vae)
    stored, high, wide = first.shape
    if not (math.isfinite(vae.scaling_factor) and vae.scaling_factor > 0):
        raise ValueError(f"scaling_factor={vae.scaling_factor} is not a positive number")
    if image_size < min(high, wide) or image_size % min(high, wide):
        raise ValueError(
            f"image_size={image_size} does not fit values of shape {first.shape}: it is the "
            "shorter side, with a whole number of pixels to each latent pixel"
        )
    if first.label is None and class_names is not None and len(class_names) != 1:
        raise ValueError(
            f"{len(class_names)} class names, but sample {first.key} has no label (cls, json, or "
            "beside the array); give labels, or no class names"
        )
    ids = class_ids(class_names)
    jobs = [_Job(path, first, values, ids) for path in paths]
    done: list[_Tar] = []
    sizes = [path.stat().st_size for path in paths]
    for tar in parallel.each(_index_tar, jobs, sizes=sizes, workers=workers):
        done.append(tar)
    faults = [f for tar in done for f in tar.faults] + _repeated(done)
    if faults:
        for path in paths:
            path.with_name(path.name + INDEX_SUFFIX).unlink(missing_ok=True)
        raise _refusal(directory, faults, len(faults) + sum(tar.num_untold for tar in done))
    num_classes = max(tar.largest_label for tar in done) + 1
    if first.label is None:
        names: Sequence[str] = class_names or UNLABELLED
    else:
        names = class_names or [str(number) for number in range(num_classes)]
    manifest = Manifest(
        created_by=f"dit_ds {dit_ds.__version__}",
        class_names=tuple(names),
        image_size=image_size,
        latent_shape=(stored // 2 if values == "moments" else stored, high, wide),
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        vae=vae.info,
        statistics=_statistics(done, values, vae, high * wide),
        layout=Layout(values=values, dtype=first.dtype),
        shards=tuple(tar.info for tar in done if tar.info),
    )
    manifest.save(directory)
    return Adopted(manifest, dict(sorted(sum((tar.ignored for tar in done), Counter()).items())))


def _tars(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a folder; give the one that holds the tars")
    names = sorted(entry.name for entry in directory.iterdir())
    packed = [name for name in names if name.endswith(_PACKED)]
    if packed:
        raise ValueError(
            f"{directory}: {len(packed)} tars are compressed (first: {packed[0]}) and cannot be "
            "read in place; unpack them (gunzip), or move them away"
        )
    paths = [directory / name for name in names if name.endswith(".tar")]
    if not paths:
        raise ValueError(f"{directory}: no *.tar lies there; give the folder that holds the shards")
    return paths


def _refusal(directory: str | Path, faults: Sequence[str], num: int) -> ValueError:
    more = f"\n... and {num - _SHOWN} more" if num > _SHOWN else ""
    return ValueError(
        f"{directory}: {num} faults; no manifest was written:\n" + "\n".join(faults[:_SHOWN]) + more
    )


@dataclass(frozen=True)
class _Job:
    """A tar to be indexed, and what the first sample of all tars decided."""

    path: Path
    first: Sample
    values: Values
    class_ids: Mapping[str, int] | None


@dataclass
class _Tar:
    """What became of a tar. info: None if there are faults, of which the first are told.

    sums: (3, C) float64: of the values, of their squares, of the posterior's variances.
    """

    path: Path
    sums: np.ndarray
    info: ShardInfo | None = None
    faults: list[str] = field(default_factory=list)
    num_untold: int = 0
    largest_label: int = 0
    ignored: Counter[str] = field(default_factory=Counter)

    def tell(self, fault: str) -> None:
        if len(self.faults) < _SHOWN:
            self.faults.append(f"{self.path.name}: {fault}")
        else:
            self.num_untold += 1


def _index_tar(job: _Job) -> _Tar:
    """Write the index of one tar, unless something is wrong with it."""
    first, path = job.first, job.path
    channels = first.shape[0] // 2 if job.values == "moments" else first.shape[0]
    done = _Tar(path, np.zeros((3, channels)))
    try:
        data = mapped(path)
    except ArrayError as error:
        done.tell(str(error))
        return done
    samples, done.ignored, wrong = grouped(data)
    for fault in wrong if samples or wrong else ["holds no samples"]:
        done.tell(fault)
    rows = []
    for key, members in samples.items():
        try:
            sample = read_sample(data, key, members, job.class_ids, done.ignored)
            _check(sample, first)
        except ArrayError as error:
            done.tell(str(error))
            continue
        rows.append((sample.header, sample.start, sample.label or 0))
        done.largest_label = max(done.largest_label, sample.label or 0)
        done.sums += _sums(sample.values, channels)
    if done.faults:
        return done
    index_file = index_bytes(np.array(rows, np.int64))
    try:
        done.info = ShardInfo(
            name=path.name,
            num_samples=len(rows),
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            index_sha256=hashlib.sha256(index_file).hexdigest(),
        )
    except pydantic.ValidationError:
        done.tell("names are of letters, digits and _ . - here; rename it")
        return done
    with atomic_file(path.with_name(path.name + INDEX_SUFFIX)) as file:
        file.write(index_file)
    return done


def _check(sample: Sample, first: Sample) -> None:
    """Raise an ArrayError where a sample does not fit the first one."""
    if (sample.shape, sample.dtype) != (first.shape, first.dtype):
        raise ArrayError(
            f"sample {sample.key} is {sample.dtype} of shape {sample.shape}, the first sample of "
            f"all {first.dtype} of {first.shape}; a data set has one shape and type"
        )
    if (sample.label is None) != (first.label is None):
        has, others = ("no label", "one") if sample.label is None else ("a label", "none")
        raise ArrayError(
            f"sample {sample.key} has {has}, the first sample of all has {others}; label all or "
            "none"
        )
    if not np.isfinite(sample.values).all():
        raise ArrayError(f"sample {sample.key} holds values that are not finite; make it again")


def _sums(values: np.ndarray, channels: int) -> np.ndarray:
    """(3, C) float64, see `_Tar.sums`. values: (C or 2C, h, w)."""
    mean, logvar = np.split(values.astype(np.float64), [channels])
    variance = np.exp(logvar.clip(-30.0, 20.0)) if len(logvar) else np.zeros_like(mean)
    return np.stack([mean, mean**2, variance]).sum(axis=(2, 3))


def _statistics(done: Sequence[_Tar], values: Values, vae: Vae, num_pixels: int) -> Statistics:
    """Of the unscaled latents; those of moments vary by their posterior too."""
    num = num_pixels * sum(tar.info.num_samples for tar in done if tar.info)
    mean, square, variance = sum((tar.sums for tar in done), np.zeros_like(done[0].sums)) / num
    std = np.sqrt(np.maximum(square - mean**2, 0.0) + variance)
    if values == "scaled_latents":
        mean, std = mean / vae.scaling_factor + vae.shift_factor, std / vae.scaling_factor
    return Statistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _repeated(done: Sequence[_Tar]) -> list[str]:
    """Tars of equal content."""
    seen: dict[str, str] = {}
    faults = []
    for info in (tar.info for tar in done if tar.info):
        other = seen.setdefault(info.sha256, info.name)
        if other != info.name:
            faults.append(f"{info.name}: has the same content as {other}; keep one")
    return faults
