"""From shards to micro-batches: the samples of each step, each with its own raw draws.

The loader hands over raw draws (uniforms, normals); the objective maps them. Nothing depends on the
number of ranks or workers or on the micro-batch, and the position is the step alone, so a resume at
any step is exact. Worlds may be uneven: all ranks take the same number of micro-batches of the same
size, filled up with samples of weight 0.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dit_ds import distributed, draws
from dit_ds.manifest import Manifest, ShardError, Store
from dit_ds.order import Order
from dit_ds.shards import ShardReader

_MAX_OPEN_SHARDS = 4096
# exp(-30 / 2) = 3e-7 is the least deviation that `latents` knows.
_LOG_VARIANCE_OF_NOTHING = -30.0


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """N samples with their raw draws.

    moments: (N, 2C, H, W) float32, mean and log-variance of the VAE, unscaled.
    y: (N,) int64 class. weight: (N,) float32, 1, or 0 where the sample only fills up.
    posterior, noise: (N, C, H, W) float32 normals. time, drop: (N,) float32 uniforms in [0, 1).
    ids, epochs: (N,) int64, which sample, and which time it is seen.
    """

    moments: torch.Tensor
    y: torch.Tensor
    weight: torch.Tensor
    posterior: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor
    drop: torch.Tensor
    ids: torch.Tensor
    epochs: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device; does not wait for copies from pinned memory."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """The same in pinned memory; `DataLoader` calls it."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        values = {f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return MicroBatch(**values)


@dataclasses.dataclass(frozen=True)
class Split:
    """How a global batch is cut over ranks and micro-steps, the same for all ranks.

    Ranks take contiguous slices that differ by at most one sample; `micro_batch` is at most the
    configured size, and as small as keeps `num_micro` steps, so that padding stays small.
    """

    global_batch: int
    world_size: int
    num_micro: int
    micro_batch: int

    @staticmethod
    def of(*, global_batch: int, world_size: int, micro_batch: int) -> Split:
        """The split with the fewest micro-steps, and among those the least padding."""
        most = math.ceil(global_batch / world_size)
        num_micro = math.ceil(most / micro_batch)
        return Split(global_batch, world_size, num_micro, math.ceil(most / num_micro))

    @property
    def padding(self) -> float:
        """Share of the computed samples that only fill up."""
        return 1 - self.global_batch / (self.world_size * self.num_micro * self.micro_batch)

    def places(self, rank: int, micro: int) -> tuple[int, int]:
        """[start, stop) of a rank's micro-batch in the global batch."""
        first = rank * self.global_batch // self.world_size
        last = (rank + 1) * self.global_batch // self.world_size
        start = min(first + micro * self.micro_batch, last)
        return start, min(start + self.micro_batch, last)


class Samples:
    """Reads chosen samples of a data set: moments, labels and raw draws."""

    def __init__(self, store: Store, manifest: Manifest, *, seed: int, flip: float) -> None:
        self.manifest, self.seed, self.flip = manifest, seed, flip
        self._store = store
        self._starts = np.cumsum([0] + [s.num_samples for s in manifest.shards])
        # A shard is verified once, at its first open; of its readers only the latest are kept.
        self._verified = np.zeros(len(manifest.shards), bool)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._image_bytes = math.prod(manifest.stored_shape) * manifest.stored_dtype.itemsize

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """(N,) int64: the number of the shard that holds each sample."""
        return np.searchsorted(self._starts, ids, side="right") - 1

    def values(self, ids: np.ndarray, flips: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What the shards hold, as they hold it: (N, *stored_shape), and classes (N,) int64."""
        manifest, size = self.manifest, self._image_bytes
        values = np.empty((len(ids), *manifest.stored_shape), manifest.stored_dtype)
        out = values.data.cast("B")
        y = np.empty(len(ids), np.int64)
        shards = self.shards_of(ids)
        rows = ids - self._starts[shards]
        # A slice of a memory map at a time: a vectorised gather would have a shard's few samples
        # of a batch to work on, and lose more than it gains.
        places = zip(shards.tolist(), rows.tolist(), flips.tolist(), strict=True)
        for i, (shard, row, flip) in enumerate(places):
            reader = self._readers.get(shard) or self._open(shard)
            out[i * size : (i + 1) * size] = reader.image(row, flip)
            y[i] = reader.label(row)
        return torch.from_numpy(values), torch.from_numpy(y)

    def _open(self, shard: int) -> ShardReader:
        info, verified = self.manifest.shards[shard], bool(self._verified[shard])
        reader = ShardReader(self._store, info, self.manifest, checked=verified)
        reader.label(0)
        self._verified[shard] = True
        self._readers[shard] = reader
        if len(self._readers) > _MAX_OPEN_SHARDS:
            self._readers.popitem(last=False)
        return reader

    def moments(self, values: torch.Tensor) -> torch.Tensor:
        """(N, 2C, h, w) float32 of what the shards hold."""
        layout = self.manifest.layout
        x = values.float()
        if layout is None or layout.values == "moments":
            return x
        if layout.values == "scaled_latents":
            x = x / self.manifest.scaling_factor + self.manifest.shift_factor
        return torch.cat([x, torch.full_like(x, _LOG_VARIANCE_OF_NOTHING)], dim=1)

    def read(self, epochs: np.ndarray, ids: np.ndarray, size: int) -> MicroBatch:
        """`size` samples: those of `ids`, then copies of the first one with weight 0."""
        epochs, ids, weight = _filled(epochs, ids, size)
        flips = draws.uniform(self.seed, "flip", epochs, ids) < self.flip
        values, y = self.values(ids, flips)
        shape = self.manifest.latent_shape
        return MicroBatch(
            moments=self.moments(values),
            y=y,
            weight=weight,
            posterior=torch.from_numpy(draws.normal(self.seed, "posterior", epochs, ids, shape)),
            noise=torch.from_numpy(draws.normal(self.seed, "noise", epochs, ids, shape)),
            time=torch.from_numpy(draws.uniform(self.seed, "time", epochs, ids)),
            drop=torch.from_numpy(draws.uniform(self.seed, "drop", epochs, ids)),
            ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs),
        )

    def read_fixed(self, ids: np.ndarray, size: int) -> MicroBatch:
        """The same for validation: drawn from streams of its own, never mirrored or dropped.

        The times of all samples of the data set are spread evenly over [0, 1), one in each of as
        many intervals, so that their mean loss varies little with the seed.
        """
        epochs, ids, weight = _filled(np.zeros(len(ids), np.int64), ids, size)
        values, y = self.values(ids, np.zeros(size, bool))
        total, shape, seed = self.manifest.num_samples, self.manifest.latent_shape, self.seed
        keys, sizes = np.zeros(size, np.int64), np.full(size, total)
        interval = draws.permuted(seed, "validation_time", 0, keys, sizes, ids)
        time = (
            interval + draws.uniform(seed, "validation_time", 0, ids).astype(np.float64)
        ) / total
        posterior = draws.normal(seed, "validation_posterior", 0, ids, shape)
        return MicroBatch(
            moments=self.moments(values),
            y=y,
            weight=weight,
            posterior=torch.from_numpy(posterior),
            noise=torch.from_numpy(draws.normal(seed, "validation_noise", 0, ids, shape)),
            time=torch.from_numpy(time.astype(np.float32)),
            drop=torch.ones(size),
            ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs),
        )


def _filled(
    epochs: np.ndarray, ids: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Epochs and ids filled up to `size` with the first sample, and weights that say so."""
    num = len(ids)
    fill = ids[0] if num else 0
    ids = np.concatenate([ids, np.full(size - num, fill, np.int64)])
    epochs = np.concatenate([epochs, np.zeros(size - num, np.int64)])
    return epochs, ids, torch.from_numpy((np.arange(size) < num).astype(np.float32))


class _MicroBatches(Dataset[MicroBatch | str]):
    """Micro-batch number step * num_micro + micro of one rank."""

    def __init__(self, samples: Samples, order: Order, split: Split, rank: int) -> None:
        self.samples, self.order, self.split, self.rank = samples, order, split, rank

    def __getitem__(self, number: int) -> MicroBatch | str:
        step, micro = divmod(number, self.split.num_micro)
        epochs, ids = self.order.batch(step, *self.split.places(self.rank, micro))
        try:
            return self.samples.read(epochs, ids, self.split.micro_batch)
        except (ShardError, OSError) as e:
            return str(e)  # as a value: a worker's exception would reach the user as a traceback


class Loader:
    """The micro-batches of this rank, step after step, read ahead by worker processes.

    Args:
        store, manifest: the data set.
        split: of the global batch over ranks and micro-steps.
        lanes, window, seed, flip: as in `dit_ds.config`.
        first_step, last_step: reads steps [first_step, last_step).
        workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        split: Split,
        *,
        lanes: int,
        window: int,
        seed: int,
        flip: float,
        first_step: int,
        last_step: int,
        workers: int,
    ) -> None:
        sizes = [s.num_samples for s in manifest.shards]
        batch = split.global_batch
        order = Order(sizes, global_batch=batch, lanes=lanes, window=window, seed=seed)
        samples = Samples(store, manifest, seed=seed, flip=flip)
        numbers = range(first_step * split.num_micro, last_step * split.num_micro)
        self._split = split
        self._batches: Iterator[MicroBatch | str] = iter(
            DataLoader(
                _MicroBatches(samples, order, split, distributed.rank()),
                batch_size=None,
                sampler=numbers,
                num_workers=workers,
                # torch's default on Linux, said because a rank may be a child of another kind.
                multiprocessing_context="fork" if workers else None,
                # Two steps ahead, whatever the number of micro-steps.
                prefetch_factor=math.ceil(2 * split.num_micro / workers) if workers else None,
                pin_memory=distributed.device().type == "cuda",
                worker_init_fn=_start_worker,
            )
        )
        self.wait_seconds = 0.0
        """Time spent waiting for data so far."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers. They ignore SIGTERM, so a process that only exits waits for them."""
        self._batches = iter(())

    def next(self) -> list[MicroBatch]:
        """The micro-batches of the next step, the same number on every rank; a collective.

        Raises:
            RankError: a shard is missing or damaged, on every rank, naming shard and key.
        """
        began = time.perf_counter()
        batches: list[MicroBatch] = []
        error = None
        for _ in range(self._split.num_micro):
            batch = next(self._batches)
            if isinstance(batch, str):
                error = ShardError(batch)
            else:
                batches.append(batch)
        distributed.agree(error)
        self.wait_seconds += time.perf_counter() - began
        return batches


def _start_worker(worker: int) -> None:
    """A worker leaves signals to its rank, which ends it; it computes on one thread."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)
