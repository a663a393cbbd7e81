"""What an extraction keeps of its finished units, so that it can be killed and goes on.

A unit's shards are written first, then its record, both atomically: a unit is finished when its
record is there. When all are, the records add up to the manifest and to `rejected.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import pydantic

from dit_ds.files import atomic_file, lock, write_atomically
from dit_ds.manifest import MANIFEST_NAME, Manifest, ShardInfo, Statistics

REJECTED_NAME, LOCK_NAME = "rejected.jsonl", "lock"
_OUR_SHARD = re.compile(r"latents-\d{6,}(-\d{4,})?\.tar(\.tmp)?")
_OURS_IN_WORK = re.compile(r"(unit-\d{6,}\.json|tar-\d{6,}\.tar)")
_DIGITS = 6  # of the statistics: sums of 10^9 values differ beyond with the CPU's kind


class Sums(pydantic.BaseModel):
    """Sums over latent pixels for each channel, in float64: of mean, mean^2 and variance."""

    num: int = 0
    mean: list[float] = []
    mean_squared: list[float] = []
    variance: list[float] = []

    def add(self, moments: np.ndarray) -> None:
        """Add moments (N, 2, 2C, h, w) float16, the images and their mirror images."""
        mean, logvar = np.split(moments.astype(np.float64), 2, axis=2)
        axes = (0, 1, 3, 4)
        more = Sums(
            num=mean.size // mean.shape[2],
            mean=mean.sum(axes).tolist(),
            mean_squared=(mean * mean).sum(axes).tolist(),
            variance=np.exp(logvar.clip(-30.0, 20.0)).sum(axes).tolist(),
        )
        self.merge(more)

    def merge(self, more: Sums) -> None:
        """Add the sums of others."""
        self.num += more.num
        for name in ("mean", "mean_squared", "variance"):
            old, new = getattr(self, name), getattr(more, name)
            setattr(self, name, [a + b for a, b in zip(old, new, strict=True)] if old else new)

    def statistics(self) -> Statistics:
        """Mean and standard deviation of samples: Var = E[mean^2] + E[variance] - E[mean]^2."""
        mean = np.array(self.mean) / self.num
        var = (np.array(self.mean_squared) + np.array(self.variance)) / self.num - mean**2
        rounded = [
            tuple(float(f"{value:.{_DIGITS}g}") for value in values)
            for values in (mean, np.sqrt(var.clip(0)))
        ]
        return Statistics(mean=rounded[0], std=rounded[1])


class Record(pydantic.BaseModel):
    """What happened to the images of one unit, or, added up, of several."""

    unit: int
    plan: str = ""
    """The sha256 of the plan that it was made by."""
    num_images: int = 0
    """All that were looked at, rejected or not."""
    shards: list[ShardInfo] = []
    rejected: list[tuple[str, str]] = []
    """Image and reason."""
    num_skipped: int = 0
    num_enlarged: int = 0
    num_animated: int = 0
    num_converted: Counter[str] = pydantic.Field(default_factory=Counter)
    num_by_label: Counter[int] = pydantic.Field(default_factory=Counter)
    sums: Sums = pydantic.Field(default_factory=Sums)

    def save(self, work: Path) -> None:
        """Write the record: from now on its unit is finished."""
        write_atomically(work / f"unit-{self.unit:06d}.json", self.model_dump_json())

    @staticmethod
    def total(records: Iterable[Record]) -> Record:
        """The records of units, in their order, added up."""
        total = Record(unit=-1)
        for record in records:
            total.num_images += record.num_images
            total.shards += record.shards
            total.rejected += record.rejected
            total.num_skipped += record.num_skipped
            total.num_enlarged += record.num_enlarged
            total.num_animated += record.num_animated
            total.num_converted += record.num_converted
            total.num_by_label += record.num_by_label
            if record.sums.num:
                total.sums.merge(record.sums)
        return total


class Extraction(pydantic.BaseModel):
    """A finished dataset, and what happened to the images on the way, over all ranks."""

    manifest: Manifest
    seconds: float
    """Of this start, preview and manifest included."""
    encoding_seconds: float
    """From the first batch that rank 0 encoded to the last that any rank wrote."""
    num_encoded: int
    """Images that this start encoded or rejected; the others were there."""
    num_skipped: int
    """Files that are not images by their suffix, or that belong to no sample of a tar."""
    num_enlarged: int
    """Images smaller than the crop."""
    num_animated: int
    """Images with more frames than the first, which was taken."""
    num_converted: dict[str, int]
    """Images stored in another colour mode than RGB, by Pillow's name for the mode."""
    empty_classes: list[str]
    """Names of the classes without a sample."""
    num_rejected: int
    """Images that could not be used; `rejected.jsonl` has them with the reasons."""
    rejected: str
    """The reasons with their counts, a line each."""

    @property
    def scaled_std(self) -> float:
        """Standard deviation of all latents as a model sees them; about 1 for a good scale."""
        statistics = self.manifest.statistics
        assert statistics is not None
        mean, std = np.array(statistics.mean), np.array(statistics.std)
        var = (std**2 + mean**2).mean() - mean.mean() ** 2
        return float(np.sqrt(var)) * abs(self.manifest.scaling_factor)


def hold(out: Path) -> IO[bytes]:
    """The folder, made if need be, for this process alone."""
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out={out}: the folder cannot be made ({error.strerror}); choose another"
        ) from error
    try:
        held = lock(out / "work" / LOCK_NAME)
    except OSError as error:
        raise ValueError(
            f"out={out}: cannot be written ({error.strerror}); make it writable or choose another"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"out={out}: another extraction is at work there; wait for it or choose another folder"
        ) from error
    if (out / MANIFEST_NAME).exists():
        raise ValueError(f"out={out}: already holds a dataset; remove it or choose another")
    return held


def finished(out: Path, plan: str) -> dict[int, Record]:
    """Records of the units that are done, by number: by this plan, with shards of their size."""
    sizes = {path.name: path.stat().st_size for path in out.glob("latents-*.tar")}
    found = {}
    for path in sorted((out / "work").glob("unit-*.json")):
        try:
            record = Record.model_validate_json(path.read_bytes())
        except pydantic.ValidationError:
            continue  # damaged, or of another version: the unit is made again
        if record.plan == plan and all(
            sizes.get(shard.name) == shard.num_bytes for shard in record.shards
        ):
            found[record.unit] = record
    return dict(sorted(found.items()))


def tidy(work: Path, *, keep: bool) -> None:
    """Remove from the work folder what killed processes left; without `keep`, all of ours."""
    for path in work.iterdir():
        ours = _OURS_IN_WORK.fullmatch(path.name) is not None
        if path.suffix in (".tmp", ".part") or (ours and not keep):
            path.unlink()


def close(out: Path, shards: Iterable[ShardInfo]) -> None:
    """Remove what the dataset of these shards, now finished, has no more use for."""
    names = {shard.name for shard in shards}
    for path in out.iterdir():  # what a run without a plan, or with another, left
        if _OUR_SHARD.fullmatch(path.name) and path.name not in names:
            path.unlink()
    tidy(out / "work", keep=False)
    (out / "work" / LOCK_NAME).unlink()
    with contextlib.suppress(OSError):  # a file of somebody else is in it
        (out / "work").rmdir()


def write_rejected(out: Path, rejected: list[tuple[str, str]]) -> None:
    """Write `rejected.jsonl`: {"image": ..., "reason": ...} on each line. No file for none."""
    if not rejected:
        (out / REJECTED_NAME).unlink(missing_ok=True)
        return
    with atomic_file(out / REJECTED_NAME) as file:
        for image, reason in rejected:
            file.write(json.dumps({"image": image, "reason": reason}).encode() + b"\n")


def summary(rejected: list[tuple[str, str]]) -> str:
    """The reasons with their counts, most frequent first, and the first image of each."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for image, reason in rejected:
        kind = re.sub(r"\d+", "N", reason)
        first.setdefault(kind, f"{image}: {reason}")
        counts[kind] += 1
    lines = [f"{num} as {first[kind]}" for kind, num in counts.most_common(5)]
    more = [f"and {len(counts) - 5} more reasons"] if len(counts) > 5 else []
    return "\n".join(f"  {line}" for line in lines + more)
