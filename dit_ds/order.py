"""Which sample comes when: a pure function of (seed, epoch), whatever reads it.

The samples of an epoch are cut into lanes, each a run of neighbouring shards, so that a host that
reads some lanes reads only their shards. Within a lane, shards are permuted and samples shuffled
within windows of shards. The batch of a step is the next `global_batch / lanes` samples of each
lane, lane after lane.

Nothing is dropped or repeated where sizes do not divide. Positions 0, 1, 2, ... of the training
count through batches, and epoch e is exactly the positions [e * N, (e + 1) * N). A lane's share of
an epoch is the number of its places among them; so shares are equal to within one step's places
and lane boundaries move by at most a batch from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dit_ds import draws


class Order:
    """The order of samples for all steps.

    Args:
        shard_sizes: number of samples of each shard; sample ids count through them.
        global_batch: samples of one step.
        lanes: divides `global_batch`.
        window: shards of a lane whose samples are shuffled together. Memory is one window a lane.
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
        self._bounds: dict[int, np.ndarray] = {}
        # One plan and one window for each lane: what is being read now.
        self._plans: dict[int, tuple[int, _Plan]] = {}
        self._windows: dict[int, tuple[tuple[int, int], int, np.ndarray]] = {}

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, ...]:
        """(epochs, ids) of places [start, stop) of the batch of `step`; int64 arrays.

        Any step is found at once; going forward reuses the windows at hand.
        """
        stop = self.global_batch if stop is None else stop
        assert 0 <= start <= stop <= self.global_batch, (start, stop)
        epochs, ids = np.empty((2, stop - start), np.int64)
        at = start
        while at < stop:
            lane = at // self._share
            end = min((lane + 1) * self._share, stop)
            while at < end:
                position = step * self.global_batch + at
                epoch = position // self.num_samples
                first = self._places(epoch * self.num_samples, lane)
                offset = self._places(position, lane) - first
                # A read ends with its window, so where sizes do not divide, the next turn of this
                # loop opens the next window or, in the middle of a lane's share, the next epoch.
                run = self._read(lane, int(epoch), int(offset), end - at)
                here = slice(at - start, at - start + len(run))
                epochs[here], ids[here] = epoch, run
                at += len(run)
        return epochs, ids

    def _places(self, positions: int | np.ndarray, lane: int | np.ndarray) -> np.ndarray:
        """How many of the positions 0 .. `positions` - 1 belong to `lane`."""
        full, part = np.divmod(positions, self.global_batch)
        return full * self._share + np.clip(part - lane * self._share, 0, self._share)

    def lane_bounds(self, epoch: int) -> np.ndarray:
        """(lanes + 1,) sample ids at which the lanes of this epoch begin and end."""
        if epoch not in self._bounds:
            lanes = np.arange(self.lanes)
            ends = self._places((epoch + 1) * self.num_samples, lanes)
            counts = ends - self._places(epoch * self.num_samples, lanes)
            self._bounds = {e: b for e, b in self._bounds.items() if e >= epoch - 1}
            self._bounds[epoch] = np.concatenate([[0], np.cumsum(counts)])
        return self._bounds[epoch]

    def _read(self, lane: int, epoch: int, offset: int, want: int) -> np.ndarray:
        """Up to `want` ids of a lane's epoch from `offset`, as far as one window reaches."""
        plan_epoch, plan = self._plans.get(lane, (-1, None))
        if plan is None or plan_epoch != epoch:
            plan = _Plan(self, lane, epoch)
            self._plans[lane] = (epoch, plan)
        number = int(np.searchsorted(plan.window_starts, offset, side="right")) - 1
        key, start, ids = self._windows.get(lane, ((-1, -1), 0, _EMPTY))
        if key != (epoch, number):
            ids, start = plan.window_ids(number), int(plan.window_starts[number])
            self._windows[lane] = ((epoch, number), start, ids)
        return ids[offset - start : offset - start + want]


_EMPTY = np.empty(0, np.int64)


class _Plan:
    """One lane in one epoch: its pieces of shards in their permuted order, cut into windows."""

    def __init__(self, order: Order, lane: int, epoch: int) -> None:
        self._order, self._lane, self._epoch = order, lane, epoch
        low, high = order.lane_bounds(epoch)[lane : lane + 2]
        inner = order.starts[(order.starts > low) & (order.starts < high)]
        edges = np.concatenate([[low], inner, [high]])
        # Key 0 of a lane permutes its shards, key 1 + w the samples of its window w.
        turn = draws.permutation(order.seed, "order", epoch, lane << 32, len(edges) - 1)
        self.first, self.count = edges[:-1][turn], np.diff(edges)[turn]
        ends = np.cumsum(self.count)
        self.window_starts = np.concatenate([[0], ends])[: -1 : order.window]

    def window_ids(self, number: int) -> np.ndarray:
        """The sample ids of a window, shuffled."""
        pieces = slice(number * self._order.window, (number + 1) * self._order.window)
        runs = zip(self.first[pieces], self.count[pieces], strict=True)
        ids = np.concatenate([np.arange(first, first + n) for first, n in runs])
        key = (self._lane << 32) + 1 + number
        return ids[draws.permutation(self._order.seed, "order", self._epoch, key, len(ids))]
