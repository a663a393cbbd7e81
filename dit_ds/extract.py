"""Images to a dataset of latents: crop, encode, write shards, then the manifest.

Runs alone or over ranks (`tools/precompute_latents.py`). What is made, and with what, is fixed in a
`plan.json` at the first start; a killed extraction goes on where it was. Ranks take units of work
as they get done with the last one. Encode batches never cross a shard and are filled up to full
size, so the bytes depend on the plan alone.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

import dit_ds
from dit_ds import distributed, files, labels, latents, records, sources
from dit_ds import plan as plans
from dit_ds.files import atomic_path
from dit_ds.heartbeat import Heartbeat
from dit_ds.manifest import MANIFEST_NAME, Manifest, ShardError, VaeInfo, check_files
from dit_ds.pipeline import Batch, Batches, Writer, crop, tasks
from dit_ds.plan import Asked, Plan
from dit_ds.progress import Progress
from dit_ds.records import Extraction, Record
from dit_ds.units import ItemReader, Rejection, TarSource, Unit, Units, units

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PREVIEW_NAME = "preview.png"
_NUM_PREVIEWS = 8
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_SECONDS_BETWEEN_LOOKS = 0.2
_SHARING_SECONDS = 120  # network file systems take a minute at times


def extract(
    images: str | Path,
    vae: str | Path,
    image_size: int,
    out: str | Path,
    *,
    classes: str | Path | None = None,
    batch_size: int | None = None,
    precision: plans.Precision | None = None,
    threads: int | None = None,
    samples_per_shard: int | None = None,
    workers: int | None = None,
    max_rejected: float = 0.01,
) -> Extraction | None:
    """Make the dataset `out` of `images`, or go on with it; a collective over all ranks.

    Returns None if it is there already, made by the same plan.

    Args:
        images: folder of class folders, text file, or tars; see `sources.open_source`.
        vae: folder or hub id of a diffusers `AutoencoderKL`.
        image_size: side of the centre crop in pixels, a multiple of the VAE's factor.
        out: folder for shards and manifest; made if need be, shared by all ranks' hosts.
        classes: text file of class names, one on each line, for labels in tars.
        batch_size: images that a rank encodes at once. None for the plan's, or the one that
            `plan.find_batch_size` finds.
        precision: of the VAE. None for the plan's, or fp32.
        threads: of each rank, for what a CPU computes. None for the plan's, or an even share.
        samples_per_shard: all shards but the last, or the last of each tar, hold so many, less what
            was rejected. None for the plan's, or 1024.
        workers: processes of each rank that read and crop; 0 does it in the rank itself.
        max_rejected: share of bad images from which on it stops.

    Raises:
        ValueError: a mistake in any of these, too many bad images, or a VAE that gives no finite
            values, told on every rank. No manifest is written then; finished units are kept.
    """
    named, out = str(out), Path(out)  # a URL would lose a slash
    hosts = distributed.gather_json(socket.gethostname())
    ranks_here = hosts.count(socket.gethostname())
    held, threads_before = None, torch.get_num_threads()
    torch.backends.cudnn.deterministic = True
    try:
        with distributed.agreed():
            least = {"batch_size": 1, "threads": 1, "samples_per_shard": 1, "workers": 0}
            for name, value in zip(
                least, (batch_size, threads, samples_per_shard, workers), strict=True
            ):
                if value is not None and value < least[name]:
                    raise ValueError(f"{name}={value} is too small; choose {least[name]} or more")
            if not 0 <= max_rejected <= 1:
                raise ValueError(f"max_rejected={max_rejected} is no share; choose from 0 to 1")
            plans.check_folders(str(images), str(vae), named)
            model = latents.load_vae(vae)
            latents.latent_shape(model, image_size)  # fails if they do not fit
            asked = Asked(
                images=plans.absolute(str(images)),
                vae=VaeInfo(name=latents.vae_name(vae), sha256=latents.vae_hash(model)),
                image_size=image_size,
                classes=None if classes is None else labels.read_class_names(classes),
                batch_size=batch_size,
                precision=precision,
                threads=threads,
                samples_per_shard=samples_per_shard,
            )
            planned = None
            if distributed.is_main():
                begun = Plan.load(out)
                if begun is not None:
                    begun.refuse_others(asked, out)
                    _check_finished(out)
                if begun is None or not (out / MANIFEST_NAME).exists():
                    found = sources.open_source(asked.images) if begun is None else None
                    held = records.hold(out)
                    if found is not None:
                        records.tidy(out / "work", keep=False)
                        plans.make(asked, found, model, out, ranks_here)
                    plan = Plan.load(out)
                    assert plan is not None
                    planned = plan.model_dump(mode="json")
        planned = distributed.broadcast_json(planned)
        if planned is None:
            return None
        with distributed.agreed():
            plan = Plan.model_validate(planned)
            plan.refuse_others(asked, out)
            plan.refuse_another_machine(out)
            _wait_for(lambda: Plan.load(out) == plan, f"{out / plans.PLAN_NAME} of rank 0")
            torch.set_num_threads(plan.threads)
            latents.move_vae(model, distributed.device(), plans.DTYPES[plan.precision])
            work = units(plan.source, out, plan.samples_per_shard)
            work.check_seen()
        num_workers = _num_workers(workers, ranks_here)
        return _Job(plan, work, model, out, num_workers, max_rejected).run()
    finally:
        torch.set_num_threads(threads_before)
        if held is not None:
            held.close()


def _check_finished(out: Path) -> None:
    """Raise a ValueError if the folder holds a manifest, and not all of its shards."""
    if (out / MANIFEST_NAME).exists():
        try:
            check_files(out, Manifest.load(out))
        except ShardError as error:
            raise ValueError(
                f"{error}. To make it again by its plan, remove {out / MANIFEST_NAME} and run the "
                "same command"
            ) from error


def _wait_for(there: Callable[[], bool], what: str) -> None:
    if not files.seen(there, seconds=_SHARING_SECONDS):
        raise ValueError(
            f"this host does not see {what}; give an output folder that all hosts share"
        )


def _num_workers(workers: int | None, ranks_here: int) -> int:
    if workers is not None:
        return workers
    if distributed.device().type == "cpu":
        return 1  # enough for what a CPU encodes, and it needs the others for that
    return min(16, max(1, len(os.sched_getaffinity(0)) // ranks_here))


class _Stopped(Exception):
    """A rank has said that all must stop."""


@dataclasses.dataclass
class _Job:
    """What is left to do of a plan."""

    plan: Plan
    units: Units
    model: AutoencoderKL
    out: Path
    num_workers: int
    max_rejected: float

    def run(self) -> Extraction:
        """Do it, and put the manifest over it."""
        began = time.monotonic()
        self.reader, self.store = ItemReader(self.plan.source), distributed.shared_store()
        left: list[int] = []
        with distributed.agreed():
            if distributed.is_main():
                left = self._take_stock()
        left = distributed.broadcast_json(left)
        images_before, encoding_began = self.store.add("images", 0), time.monotonic()
        rejected: list[tuple[str, str]] = []  # of this rank's unfinished unit
        with Heartbeat(self.store) as heartbeat, distributed.agreed():
            try:
                self._encode(left, rejected)
            except _Stopped:
                pass
            except dist.DistError:
                heartbeat.end_without(0, "is gone")
            except Exception as error:
                self.store.set("stop", "")
                if isinstance(error, OSError) and error.errno in _NO_SPACE:
                    raise ValueError(
                        f"out={self.out}: cannot be written ({error.strerror}); make room, and "
                        "start again: what is finished is kept"
                    ) from error
                raise
        encoding_seconds = time.monotonic() - encoding_began
        in_flight = distributed.gather_json(rejected)
        done = None
        with distributed.agreed():
            if distributed.is_main():
                total = Record.total(self._finished().values())
                total.rejected += [(name, why) for theirs in in_flight for name, why in theirs]
                manifest = self._finish(total)
                names = enumerate(manifest.class_names)
                extraction = Extraction(
                    manifest=manifest,
                    empty_classes=[name for i, name in names if not total.num_by_label[i]],
                    seconds=time.monotonic() - began,
                    encoding_seconds=encoding_seconds,
                    num_encoded=self.store.add("images", 0) - images_before,
                    num_skipped=total.num_skipped + self.plan.source.num_skipped,
                    num_enlarged=total.num_enlarged,
                    num_animated=total.num_animated,
                    num_converted=dict(sorted(total.num_converted.items())),
                    num_rejected=len(total.rejected),
                    rejected=records.summary(total.rejected),
                )
                done = extraction.model_dump(mode="json")
        return Extraction.model_validate(distributed.broadcast_json(done))

    def _take_stock(self) -> list[int]:
        """Count what is done, and list the units that are left; on rank 0."""
        work = self.out / "work"
        records.tidy(work, keep=True)
        if not (self.out / PREVIEW_NAME).exists():
            self._preview(self.units.unit(0))
        done = records.finished(self.out, self.plan.sha256)
        for number in done:
            (work / f"tar-{number:06d}.tar").unlink(missing_ok=True)
        self.store.add("images", sum(record.num_images for record in done.values()))
        self.store.add("rejected", sum(len(record.rejected) for record in done.values()))
        self.store.add("work", sum(self.units.work(number) for number in done))
        plan, world = self.plan, distributed.world_size()
        kept = f"{len(done)} of {self.units.num_units} units are there already; " if done else ""
        print(
            f"{kept}{world} rank{'s' * (world > 1)} encode{'s' * (world == 1)} {plan.batch_size} "
            f"images at a time in {plan.precision} on {plan.device}",
            flush=True,
        )
        return [number for number in range(self.units.num_units) if number not in done]

    def _finished(self) -> dict[int, Record]:
        """All records, or, if the ranks have stopped, those that there are."""
        done: dict[int, Record] = {}

        def all_there() -> bool:
            done.update(records.finished(self.out, self.plan.sha256))
            return self._stopped() or len(done) == self.units.num_units

        _wait_for(all_there, f"the records or shards of all units in {self.out}")
        return dict(sorted(done.items()))

    def _preview(self, unit: Unit) -> None:
        """A sheet of the first images, so that a wrong VAE, scale or crop is seen at once."""
        images: list[np.ndarray] = []
        names: list[str] = []
        for item in unit.items:
            try:
                images.append(crop(self.reader, item, self.plan.image_size).pixels)
                names.append(item.name)
            except Rejection:
                continue  # it is counted when its turn comes
            if len(images) == _NUM_PREVIEWS:
                break
        if images:
            with atomic_path(self.out / PREVIEW_NAME) as path:
                latents.preview_sheet(self.model, images, names).save(path, "PNG")

    def _encode(self, left: list[int], rejected: list[tuple[str, str]]) -> None:
        """Take units and encode them until there are none, and all ranks are done.

        `rejected` holds, at the end, the bad images of the unit that this rank has not finished.
        """
        plan, store = self.plan, self.store

        def next_unit() -> Unit | None:
            place = store.add("taken", 1) - 1
            return self.units.unit(left[place]) if place < len(left) else None

        work = tasks(
            next_unit,
            self._stopped,
            samples_per_shard=plan.samples_per_shard,
            batch_size=plan.batch_size,
        )
        progress = Progress(store, self.units.total_work)
        batches = Batches(work, self.reader, plan, self.num_workers, self.model.device.type)
        with progress:
            with Writer(plan, self.out) as writer, batches:
                for batch in batches:
                    if self._stopped():
                        raise _Stopped
                    moments = None
                    if batch.crops:
                        moments = latents.encode_on_device(self.model, batch.pixels)
                    writer.put(batch, moments)
                    rejected += batch.rejected
                    if batch.task.last:
                        rejected.clear()
                        if batch.task.fetched:
                            batch.task.fetched.unlink()
                    self._count(batch)
                    progress.show()
            self._meet(progress)

    def _stopped(self) -> bool:
        return self.store.check(["stop"])

    def _count(self, batch: Batch) -> None:
        """Tell all ranks what was done; stop them when too many images are bad."""
        self.store.add("images", batch.num_images)
        work = self.store.add("work", batch.task.work)
        images = self.store.add("images", 0)  # later: no rank's work counts without its images
        rejected = self.store.add("rejected", len(batch.rejected))
        source = self.plan.source
        if isinstance(source, TarSource):  # nobody knows how many there are; if all are like these
            in_all = images * self.units.total_work / max(1, work)
        else:
            in_all = source.num_images
        if rejected > self.max_rejected * in_all:
            self.store.set("stop", "")
            raise _Stopped

    def _meet(self, progress: Progress) -> None:
        """Wait for the other ranks, however long their last units take."""
        self.store.add("finished", 1)
        while self.store.add("finished", 0) < distributed.world_size():
            if self._stopped():
                raise _Stopped
            progress.show()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _finish(self, total: Record) -> Manifest:
        """Make the dataset of what the ranks wrote; a ValueError if too much was rejected."""
        records.write_rejected(self.out, total.rejected)
        num_rejected, seen = len(total.rejected), self.store.add("images", 0)
        if self._stopped() or num_rejected > self.max_rejected * seen or not total.shards:
            raise ValueError(
                f"{num_rejected} of the {seen} images so far cannot be used, and "
                f"max_rejected={self.max_rejected:g} is the share that may be so; "
                f"{self.out / records.REJECTED_NAME} names all:\n"
                f"{records.summary(total.rejected)}\n"
                "To do without them, start again with a higher --max-rejected: what is finished is "
                f"kept. Or repair them, remove {self.out} and begin anew."
            )
        plan = self.plan
        num_labels = max(total.num_by_label) + 1
        names = plan.source.class_names or [str(i) for i in range(num_labels)]
        space = latents.LatentSpace.from_vae(self.model)
        manifest = Manifest(
            created_by=f"dit_ds {dit_ds.__version__}",
            class_names=tuple(names),
            image_size=plan.image_size,
            latent_shape=latents.latent_shape(self.model, plan.image_size),
            scaling_factor=space.scaling_factor,
            shift_factor=space.shift_factor,
            vae=plan.vae,
            statistics=total.sums.statistics(),
            shards=tuple(total.shards),
        )
        check_files(self.out, manifest)  # fails where the ranks' hosts do not share `out`
        manifest.save(self.out)
        records.close(self.out, total.shards)
        return manifest
