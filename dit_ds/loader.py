"""From a data set to micro-batches: which rank and which worker reads which samples, and when.

Nothing depends on the number of ranks or workers or on the micro-batch, and the position is the
step alone, so a resume at any step is exact. Worlds may be uneven: all ranks take the same number
of micro-batches of the same size, filled up with samples of weight 0.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import socket
import time
from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset

from dit_ds import distributed
from dit_ds.manifest import Manifest, ShardError, Store
from dit_ds.order import Order
from dit_ds.parallel import begin_worker
from dit_ds.remote import Prefetcher, Remote
from dit_ds.samples import MicroBatch, Samples


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

    def slice(self, rank: int) -> tuple[int, int]:
        """[start, stop) of a rank's part of the global batch."""
        first = rank * self.global_batch // self.world_size
        return first, (rank + 1) * self.global_batch // self.world_size

    def lanes_of(self, rank: int, lanes: int) -> range:
        """The lanes that a rank reads, of so many."""
        start, stop = self.slice(rank)
        share = self.global_batch // lanes
        return range(start // share, -(-stop // share))

    def places(self, rank: int, micro: int) -> tuple[int, int]:
        """[start, stop) of a rank's micro-batch in the global batch."""
        first, last = self.slice(rank)
        start = min(first + micro * self.micro_batch, last)
        return start, min(start + self.micro_batch, last)


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
        lanes_here = len(split.lanes_of(distributed.rank(), order.lanes))
        # One more of each lane, since windows end within a micro-batch.
        max_open = _open_files(max(1, min(len(sizes), lanes_here * (window + 1))))
        samples = Samples(store, manifest, seed=seed, flip=flip, max_open=max_open)
        numbers = range(first_step * split.num_micro, last_step * split.num_micro)
        self._split, self._step = split, first_step
        self._ahead: Prefetcher | None = None
        if isinstance(store, Remote):
            hosts = distributed.gather_json(socket.gethostname())
            here = [r for r, host in enumerate(hosts) if host == socket.gethostname()]
            with distributed.agreed():
                _check_cache(store.cache.max_bytes, manifest, order, split, here)

            def needs(step: int) -> list[int]:
                ids = order.batch(step, *split.slice(distributed.rank()))[1]
                return np.unique(samples.shards_of(ids)).tolist()

            self._ahead = Prefetcher(
                store,
                manifest,
                needs,
                first_step=first_step,
                last_step=last_step,
                # With what is being read, that is a window and a half: the cache holds two.
                horizon=max(1, order.window_steps() // 2),
            )
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
                worker_init_fn=begin_worker,
            )
        )
        self.wait_seconds = 0.0
        """Time spent waiting for data so far."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers. They ignore SIGTERM, so a process that only exits waits for them."""
        self._batches = iter(())
        if self._ahead is not None:
            self._ahead.close()

    def next(self) -> list[MicroBatch]:
        """The micro-batches of the next step, the same number on every rank; a collective.

        Raises:
            RankError: a shard is missing or damaged, on every rank, naming shard and key.
        """
        began = time.perf_counter()
        if self._ahead is not None:
            self._ahead.advance(self._step)
        self._step += 1
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


def _check_cache(
    max_bytes: int, manifest: Manifest, order: Order, split: Split, ranks: list[int]
) -> None:
    """Refuse a cache that would fetch each shard many times: it holds two windows of the `ranks`.

    One is being read and the next one fetched.
    """
    lanes = {lane for rank in ranks for lane in split.lanes_of(rank, order.lanes)}
    total = sum(shard.num_bytes for shard in manifest.shards)
    mean, window = total / len(manifest.shards), order.window
    need = min(total, 2 * len(lanes) * window * mean)
    if max_bytes < need:
        smaller = int(max_bytes / (2 * len(lanes) * mean))
        raise ValueError(
            f"data.cache_gb={max_bytes / 1e9:g} does not hold two windows of this machine's "
            f"{len(lanes)} lanes, {need / 1e9:.3g} GB, and would fetch shards again and again; set "
            f"data.cache_gb={math.ceil(need / 1e8) / 10:g}"
            + (f", or for a new run data.window={smaller}" if smaller else "")
        )


def _open_files(wanted: int) -> int:
    """Let this process and its workers have so many shards open; how many they may.

    The usual limit of 1,024 files is less than the shards of a window on few ranks. A process has
    other files too, hence twice as many and some.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * wanted + 512
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(1, (soft - 512) // 2))
