"""Which sample comes when: a pure function of (seed, epoch), whatever reads it.

The samples of an epoch are cut into lanes, each a run of neighbouring shards, so that a host that
reads some lanes reads only their shards. Within a lane, shards are permuted and samples shuffled
within windows of shards. The batch of a step is the next `global_batch / lanes` samples of each
lane, lane after lane.

Nothing is dropped or repeated where sizes do not divide. Positions 0, 1, 2, ... of the training
count through batches, and epoch e is exactly the positions [e * N, (e + 1) * N). A lane's share of
an epoch is the number of its places among them; so shares are equal to within one step's places
and lane boundaries move by at most a batch from epoch to epoch.

Nothing is listed either: a window's shuffle is evaluated at the places that are asked for
(`draws.permuted`). So 10^9 samples take no more memory than their shards do, and any step is found
at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dit_ds import draws

VERSION = 2
"""Of the order and the draws; a run is finished under the one that it was begun with."""

_FOUND_TOGETHER = 4096


class Order:
    """The order of samples for all steps.

    Args:
        shard_sizes: number of samples of each shard; sample ids count through them.
        global_batch: samples of one step.
        lanes: divides `global_batch`.
        window: shards of a lane whose samples are shuffled together.
        seed: of the run.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, global_batch: int, lanes: int, window: int, seed: int
    ) -> None:
        assert global_batch % lanes == 0, (global_batch, lanes)
        self.starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
        self.num_samples = int(self.starts[-1])
        self.global_batch, self.lanes, self.window, self.seed = global_batch, lanes, window, seed
        self._share = global_batch // lanes
        self._epochs: dict[int, _Epoch] = {}
        self._found: dict[tuple[int, int], tuple[int, np.ndarray, np.ndarray]] = {}

    def batch(
        self, step: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, ids) of places [start, stop) of the batch of `step`; int64 arrays.

        Some steps are found together, since one alone costs numpy almost as much.
        """
        stop = self.global_batch if stop is None else stop
        assert 0 <= start <= stop <= self.global_batch, (start, stop)
        num_steps = min(
            _FOUND_TOGETHER // max(1, stop - start), self.num_samples // self.global_batch
        )
        num_steps = max(1, num_steps)
        first = step // num_steps * num_steps
        if self._found.get((start, stop), (-1,))[0] != first:
            steps = np.arange(first, first + num_steps)
            epochs, ids = self._batches(steps, np.arange(start, stop))
            self._found[start, stop] = (first, epochs, ids)
        _, epochs, ids = self._found[start, stop]
        return epochs[step - first], ids[step - first]

    def _batches(self, steps: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, ids), each (len(steps), len(places))."""
        positions = steps[:, None] * self.global_batch + places
        epochs = positions // self.num_samples
        lanes = np.broadcast_to(places // self._share, positions.shape)
        before = self._places(epochs * self.num_samples, lanes)
        ids = self._places(positions, lanes) - before  # as yet, how far into its lane each is
        for number in np.unique(epochs):
            here = epochs == number
            ids[here] = self._epoch(int(number)).ids(lanes[here], ids[here])
        return epochs, ids

    def window_steps(self) -> int:
        """For how many steps the samples of an average window last."""
        shards = max(1, (len(self.starts) - 1) // self.lanes)
        shards = min(self.window, shards)
        return int(shards * self.num_samples / (len(self.starts) - 1) / self._share) + 1

    def _places(self, positions: np.ndarray | int, lanes: np.ndarray) -> np.ndarray:
        """How many of the positions 0 .. `positions` - 1 belong to each of `lanes`."""
        full, part = np.divmod(positions, self.global_batch)
        return full * self._share + np.clip(part - lanes * self._share, 0, self._share)

    def lane_bounds(self, epoch: int) -> np.ndarray:
        """(lanes + 1,) sample ids at which the lanes of this epoch begin and end."""
        lanes = np.arange(self.lanes)
        ends = self._places((epoch + 1) * self.num_samples, lanes)
        counts = ends - self._places(epoch * self.num_samples, lanes)
        return np.concatenate([[0], np.cumsum(counts)])

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e == number - 1}
            self._epochs[number] = _Epoch(self, number)
        return self._epochs[number]


class _Epoch:
    """One epoch, lane after lane: pieces of shards in their permuted order, cut into windows."""

    def __init__(self, order: Order, number: int) -> None:
        self._seed, self._number = order.seed, number
        self._bounds = order.lane_bounds(number)
        edges = np.sort(np.concatenate([order.starts, self._bounds]), kind="stable")
        edges = edges[np.append(True, np.diff(edges) > 0)]  # np.unique takes 100 times as long
        lane = np.searchsorted(self._bounds, edges[:-1], side="right") - 1
        # Sorted by lane, and in the lane by a hash of the piece's first sample.
        hashes = draws.bits(order.seed, "order", number, edges[:-1]) >> np.uint64(20)
        turn = np.argsort(lane.astype(np.uint64) << np.uint64(44) | hashes, kind="stable")
        counts = np.diff(edges)[turn]
        self._first = edges[:-1][turn]  # sample id that each piece begins with
        self._begin = np.cumsum(counts) - counts  # the piece's begin in the epoch
        first_of_lane = np.searchsorted(lane, np.arange(order.lanes))  # `turn` leaves lanes alone
        place = np.arange(len(turn)) - first_of_lane[lane]
        self._windows = np.append(self._begin[place % order.window == 0], order.num_samples)

    def ids(self, lanes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The sample ids at `offsets` into `lanes`; all (N,)."""
        at = self._bounds[lanes] + offsets
        window = np.searchsorted(self._windows, at, side="right") - 1
        low, high = self._windows[window], self._windows[window + 1]
        # Negative keys, since the pieces have the others.
        at = low + draws.permuted(self._seed, "order", self._number, ~low, high - low, at - low)
        piece = np.searchsorted(self._begin, at, side="right") - 1
        return self._first[piece] + at - self._begin[piece]
