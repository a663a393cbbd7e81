"""Chosen samples of a data set: what the shards hold, and each sample's own raw draws.

Raw draws are uniforms and normals; the objective maps them. They follow from the sample and the
epoch alone, and never from what else is read or by whom.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import multiprocessing
import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch

from dit_ds import draws
from dit_ds.indexed import open_reader
from dit_ds.manifest import Manifest, Store
from dit_ds.shards import Reader

_UNKNOWN, _CLAIMED, _VERIFIED = range(3)  # what is known of a shard
_PATIENCE_SECONDS = 60.0
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


class Samples:
    """Reads chosen samples of a data set: moments, labels and raw draws.

    Each shard is verified once, at its first open, by one of the processes that were forked with
    this object: the others wait for it.

    Args:
        store, manifest: the data set.
        seed, flip: as in `dit_ds.config`.
        max_open: shards that are kept open, those read last. Each holds a file; and of one that the
            cache has evicted, its space on the disk.
    """

    def __init__(
        self, store: Store, manifest: Manifest, *, seed: int, flip: float, max_open: int = 64
    ) -> None:
        self.manifest, self.seed, self.flip = manifest, seed, flip
        self._store, self._max_open = store, max_open
        self._starts = np.cumsum([0] + [s.num_samples for s in manifest.shards])
        self._readers: OrderedDict[int, Reader] = OrderedDict()
        # Shared with the processes that are forked from here.
        self._states = np.frombuffer(mmap.mmap(-1, len(manifest.shards)), np.uint8)
        self._lock = multiprocessing.get_context("fork").Lock()
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
            self._readers.move_to_end(shard)
            out[i * size : (i + 1) * size] = reader.image(row, flip)
            y[i] = reader.label(row)
        return torch.from_numpy(values), torch.from_numpy(y)

    def _open(self, shard: int) -> Reader:
        ours = self._claim(shard)
        info = self.manifest.shards[shard]
        reader = open_reader(self._store, info, self.manifest, checked=not ours)
        try:
            reader.label(0)
        except BaseException:
            self._states[shard] = _UNKNOWN  # whoever waits finds the fault again, and tells it
            raise
        self._states[shard] = _VERIFIED
        self._readers[shard] = reader
        if len(self._readers) > self._max_open:
            self._readers.popitem(last=False)
        return reader

    def _claim(self, shard: int) -> bool:
        """Whether it is this process that must verify a shard; waits while another one does."""
        began = time.monotonic()
        while True:
            with self._lock:
                state = self._states[shard]
                # A process that was killed never tells; verifying twice does no harm.
                if state == _UNKNOWN or time.monotonic() - began > _PATIENCE_SECONDS:
                    self._states[shard] = _CLAIMED
                    return True
            if state == _VERIFIED:
                return False
            time.sleep(0.001)

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
