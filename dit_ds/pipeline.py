"""From units of work to records: images read and cropped ahead, moments written behind.

    units ─ tasks ─▶ Batches (worker processes: read, decode, crop) ─▶ the encoder
        ─▶ Writer (a thread: shards, checksums, statistics) ─▶ records

A task is one encode batch: consecutive images of one shard. Which images share a batch does not
depend on which of them are bad.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dit_ds import latents
from dit_ds.manifest import ShardInfo
from dit_ds.parallel import begin_worker, in_background
from dit_ds.plan import Plan
from dit_ds.records import Record
from dit_ds.shards import ShardWriter
from dit_ds.units import Item, ItemReader, ListedSource, Rejection, Unit

_MAX_PENDING = 4  # batches that wait to be written: more would only fill the memory
_POLL_SECONDS = 0.5


class Task(NamedTuple):
    """One encode batch of a unit: what is read, and the place of it."""

    unit: int
    shard: int
    """Number of the shard in its unit."""
    items: list[Item]
    work: int
    """Share of all work."""
    last: bool
    """Of its unit."""
    num_skipped: int
    fetched: Path | None
    """On the last task: a downloaded tar that nobody needs any more."""


class Crop(NamedTuple):
    """One image, ready for the encoder, and what it was before."""

    pixels: np.ndarray
    """(size, size, 3) uint8."""
    label: int
    mode: str
    enlarged: bool
    animated: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """What became of a task."""

    task: Task
    """Without its items."""
    num_images: int
    pixels: torch.Tensor
    """(batch size, size, size, 3) uint8, filled up by copies; none if all images were rejected."""
    crops: list[tuple[str, str, int]]
    """Key, name and label of the images in `pixels`."""
    rejected: list[tuple[str, str]]
    """Name and reason of the others."""
    num_enlarged: int
    num_animated: int
    modes: Counter[str]

    def pin_memory(self) -> Batch:
        """The same in pinned memory; `DataLoader` calls it."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory())


def tasks(
    next_unit: Callable[[], Unit | None],
    stopped: Callable[[], bool],
    *,
    samples_per_shard: int,
    batch_size: int,
) -> Iterator[Task]:
    """The tasks of this rank's units, as long as there are any and nobody `stopped`.

    The next unit is fetched while the tasks of one are handed out.
    """
    ahead = in_background(next_unit)
    while not stopped():
        if not concurrent.futures.wait([ahead], timeout=_POLL_SECONDS).done:
            continue
        unit = ahead.result()
        if unit is None:
            return
        ahead = in_background(next_unit)
        yield from _cut(unit, samples_per_shard, batch_size)


def _cut(unit: Unit, samples_per_shard: int, batch_size: int) -> Iterator[Task]:
    num = len(unit.items)
    starts = [
        start
        for shard in range(0, num, samples_per_shard)
        for start in range(shard, min(shard + samples_per_shard, num), batch_size)
    ]
    for start in starts or [0]:  # an empty tar, too, must be recorded
        shard = start // samples_per_shard
        stop = min(start + batch_size, (shard + 1) * samples_per_shard, num)
        last = stop == num
        done = [unit.work * place // num if num else unit.work for place in (start, stop)]
        yield Task(
            unit=unit.number,
            shard=shard,
            items=unit.items[start:stop],
            work=done[1] - done[0] if num else unit.work,
            last=last,
            num_skipped=unit.num_skipped if last else 0,
            fetched=unit.fetched if last else None,
        )


def crop(reader: ItemReader, item: Item, size: int) -> Crop:
    """Read, decode and crop one image; a `Rejection` says why it is no good."""
    content, label = reader.read(item)
    try:
        image, mode, animated = latents.read_image(content)
        pixels = latents.center_crop(image, size)
    except ValueError as error:
        raise Rejection(str(error).removeprefix("image: ")) from error
    return Crop(pixels, label, mode, min(image.size) < size, animated)


class _Crops(Dataset[Batch | str]):
    """What workers do: `dataset[task]` is its batch, or what is wrong on this host."""

    def __init__(self, reader: ItemReader, size: int, batch_size: int) -> None:
        self._reader, self._size, self._batch_size = reader, size, batch_size

    def __getitem__(self, task: Task) -> Batch | str:
        crops: list[tuple[Item, Crop]] = []
        rejected: list[tuple[str, str]] = []
        for item in task.items:
            try:
                crops.append((item, crop(self._reader, item, self._size)))
            except Rejection as error:
                rejected.append((item.name, str(error)))
            except OSError as error:
                # As a value: a worker's exception would reach the user as a traceback.
                return f"{item.name}: {error}"
        pixels = np.zeros((0, self._size, self._size, 3), np.uint8)
        if crops:
            fill = [crops[-1][1].pixels] * (self._batch_size - len(crops))
            pixels = np.stack([c.pixels for _, c in crops] + fill)
        return Batch(
            task=task._replace(items=[]),
            num_images=len(task.items),
            pixels=torch.from_numpy(pixels),
            crops=[(item.key, item.name, c.label) for item, c in crops],
            rejected=rejected,
            num_enlarged=sum(c.enlarged for _, c in crops),
            num_animated=sum(c.animated for _, c in crops),
            modes=Counter(c.mode for _, c in crops if c.mode != "RGB"),
        )


class Batches:
    """The batches of tasks, in their order, made by worker processes (0: by this one).

    Leaving the `with` block ends the workers. Tasks are taken as they can be worked on.
    """

    def __init__(
        self, work: Iterable[Task], reader: ItemReader, plan: Plan, workers: int, device: str
    ) -> None:
        self._batches: Iterator[Batch | str] = iter(
            DataLoader(
                _Crops(reader, plan.image_size, plan.batch_size),
                batch_size=None,
                sampler=work,
                num_workers=workers,
                # torch's default on Linux, said because a rank may be a child of another kind.
                multiprocessing_context="fork" if workers else None,
                pin_memory=device == "cuda",
                worker_init_fn=begin_worker,
            )
        )

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers. They ignore SIGTERM, so a process that only exits waits for them."""
        self._batches = iter(())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; an OSError if this host cannot read what is no fault of the images."""
        batch = next(self._batches)
        if isinstance(batch, str):
            raise OSError(batch)
        return batch


class Writer:
    """Writes what was encoded, in a thread: shards, then the record of each finished unit.

    Leaving the `with` block well waits until all is written; by an error, the shard that is open is
    thrown away.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        self._listed, self._out = isinstance(plan.source, ListedSource), out
        self._plan = plan.sha256
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._record: Record | None = None
        self._shard: ShardWriter | None = None
        self._number = -1  # of the open shard
        self._failed = False

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        try:
            if error[0] is None:
                self._wait(0)
        finally:
            if self._shard is not None:
                self._shard.__exit__(RuntimeError, RuntimeError("the unit is not finished"), None)

    def put(self, batch: Batch, moments: torch.Tensor | None) -> None:
        """Write a batch by and by. moments: (batch size, 2, 2C, h, w) float16, on any device.

        Raises what went wrong with earlier ones: a ValueError names an image whose moments are not
        finite.
        """
        ready = None
        if moments is not None and moments.is_cuda:
            moments = moments.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(self._thread.submit(self._write, batch, moments, ready))
        self._wait(_MAX_PENDING)

    def _wait(self, most: int) -> None:
        while len(self._pending) > most or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def _write(
        self, batch: Batch, moments: torch.Tensor | None, ready: torch.cuda.Event | None
    ) -> None:
        if self._failed:
            return  # nothing after a hole: no shard and no record
        self._failed = True
        self._add(batch, moments, ready)
        self._failed = False

    def _add(
        self, batch: Batch, moments: torch.Tensor | None, ready: torch.cuda.Event | None
    ) -> None:
        task = batch.task
        record = self._record = self._record or Record(unit=task.unit, plan=self._plan)
        if self._number != task.shard:
            self._close()
        if moments is not None:
            if ready is not None:
                ready.synchronize()
            values = moments.numpy()[: len(batch.crops)]  # without what fills up
            latents.check_finite(values, [name for _, name, _ in batch.crops])
            record.sums.add(values)
            if self._shard is None:
                self._open(task)
            assert self._shard is not None
            for (key, _, label), value in zip(batch.crops, values, strict=True):
                self._shard.add(key, value, label)
                record.num_by_label[label] += 1
        record.num_images += batch.num_images
        record.rejected += batch.rejected
        record.num_skipped += task.num_skipped
        record.num_enlarged += batch.num_enlarged
        record.num_animated += batch.num_animated
        record.num_converted += batch.modes
        if task.last:
            self._close()
            record.save(self._out / "work")
            self._record = None

    def _open(self, task: Task) -> None:
        name = f"latents-{task.unit:06d}" + ("" if self._listed else f"-{task.shard:04d}")
        self._shard, self._number = ShardWriter(self._out / f"{name}.tar"), task.shard
        self._shard.__enter__()

    def _close(self) -> None:
        if self._shard is not None and self._record is not None:
            self._shard.__exit__(None, None, None)
            self._record.shards.append(ShardInfo.model_validate(self._shard.info))
        self._shard, self._number = None, -1
