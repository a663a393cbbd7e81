"""The order is a permutation in every epoch, and nobody but the step decides what comes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ds import distributed, draws
from dit_ds.loader import Loader, MicroBatch, Samples, Split
from dit_ds.manifest import Folder, Manifest
from dit_ds.order import Order
from tests.conftest import make_latents, run_ranks


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any sizes, most of which do not divide each other."""
    lanes = draw(st.integers(1, 8))
    return Order(
        draw(st.lists(st.integers(1, 30), min_size=1, max_size=12)),
        global_batch=lanes * draw(st.integers(1, 5)),
        lanes=lanes,
        window=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 3)),
    )


@settings(max_examples=200, deadline=None)
@given(orders(), st.integers(0, 5))
def test_each_epoch_is_a_permutation(order: Order, first: int) -> None:
    n, batch = order.num_samples, order.global_batch
    steps = range(first * n // batch, (first + 2) * n // batch + 1)
    epochs, ids = (np.concatenate(x) for x in zip(*(order.batch(s) for s in steps), strict=True))
    places = np.arange(steps[0] * batch, (steps[-1] + 1) * batch)
    assert np.array_equal(epochs, places // n)
    for epoch in (first, first + 1):
        assert sorted(ids[epochs == epoch]) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 40), st.data())
def test_any_step_and_any_slice_is_found_without_a_past(
    order: Order, step: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, order.global_batch))
    stop = data.draw(st.integers(start, order.global_batch))
    whole = [order.batch(s) for s in range(step + 1)][-1]
    fresh = Order(
        np.diff(order.starts).tolist(),
        global_batch=order.global_batch,
        lanes=order.lanes,
        window=order.window,
        seed=order.seed,
    )
    for a, b in zip(whole, fresh.batch(step, start, stop), strict=True):
        assert np.array_equal(a[start:stop], b)


def test_lanes_stay_at_their_shards_and_epochs_differ() -> None:
    order = Order([100] * 32, global_batch=64, lanes=16, window=2, seed=0)
    seen: dict[int, list[np.ndarray]] = {lane: [] for lane in range(16)}
    for step in range(50):  # an epoch
        _, ids = order.batch(step)
        for lane in range(16):
            seen[lane].append(ids[lane * 4 : lane * 4 + 4])
    for lane, runs in seen.items():
        assert set(np.concatenate(runs) // 100) == {2 * lane, 2 * lane + 1}
    assert not np.array_equal(order.batch(0)[1], order.batch(50)[1])
    other = Order([100] * 32, global_batch=64, lanes=16, window=2, seed=1)
    assert not np.array_equal(order.batch(0)[1], other.batch(0)[1])


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40))
def test_split_covers_the_batch_once(batch: int, world: int, micro: int) -> None:
    split = Split.of(global_batch=batch, world_size=world, micro_batch=micro)
    places: list[int] = []
    for rank in range(world):
        for m in range(split.num_micro):
            start, stop = split.places(rank, m)
            assert stop - start <= split.micro_batch <= micro
            places += range(start, stop)
    assert places == list(range(batch))
    computed = world * split.num_micro * split.micro_batch
    assert split.padding == pytest.approx(1 - batch / computed)


def ledger(
    folder: str, batch: int, micro: int, workers: int, first: int, last: int
) -> list[list[tuple[int, int, int, str]]]:
    """For each step: (epoch, sample, class, hash of data and draws) of this rank's samples."""
    distributed.init()
    manifest = Manifest.load(folder)
    split = Split.of(global_batch=batch, world_size=distributed.world_size(), micro_batch=micro)
    loader = Loader(
        Folder(folder),
        manifest,
        split,
        lanes=4,
        window=2,
        seed=3,
        flip=0.5,
        first_step=first,
        last_step=last,
        workers=workers,
    )
    steps = []
    for _ in range(first, last):
        micros = loader.next()
        assert len(micros) == split.num_micro
        steps.append([row for m in micros for row in rows(m)])
    del loader
    distributed.shutdown()
    return steps


def rows(m: MicroBatch) -> list[tuple[int, int, int, str]]:
    found = []
    for i in torch.nonzero(m.weight).flatten().tolist():
        parts = (m.moments, m.posterior, m.noise, m.time, m.drop)
        digest = hashlib.sha256(b"".join(p[i].numpy().tobytes() for p in parts)).hexdigest()
        found.append((int(m.epochs[i]), int(m.ids[i]), int(m.y[i]), digest))
    return found


def joined(ranks: list[list[list[tuple[int, int, int, str]]]]) -> list[list[tuple]]:
    return [[row for rank in ranks for row in rank[step]] for step in range(len(ranks[0]))]


def test_ranks_workers_micro_batches_and_resumes_change_nothing(tmp_path: Path) -> None:
    make_latents(tmp_path, counts=(13, 7, 30))
    folder, steps = str(tmp_path), 11
    alone = joined(run_ranks(1, ledger, folder, 12, 12, 0, 0, steps))
    assert [len(step) for step in alone] == [12] * steps
    first_epoch = [row[1] for step in alone for row in step if row[0] == 0]
    assert sorted(first_epoch) == list(range(50))
    for world, micro, workers in ((2, 4, 0), (3, 8, 1), (4, 2, 3), (5, 12, 0)):
        assert joined(run_ranks(world, ledger, folder, 12, micro, workers, 0, steps)) == alone
    assert joined(run_ranks(2, ledger, folder, 12, 5, 1, 7, steps)) == alone[7:]


def test_more_ranks_than_samples_in_a_batch(tmp_path: Path) -> None:
    make_latents(tmp_path, counts=(9,))
    alone = joined(run_ranks(1, ledger, str(tmp_path), 4, 4, 0, 0, 5))
    assert joined(run_ranks(6, ledger, str(tmp_path), 4, 4, 0, 0, 5)) == alone


def test_samples_are_what_the_shards_hold(tmp_path: Path) -> None:
    manifest = make_latents(tmp_path, counts=(5, 3))
    samples = Samples(Folder(tmp_path), manifest, seed=0, flip=0.5)
    ids, epochs = np.array([7, 0, 4]), np.array([0, 2, 1])
    batch = samples.read(epochs, ids, 4)
    # The values in the order in which make_latents drew them.
    rng = np.random.default_rng(0)
    written = [rng.normal(size=(2, 8, 4, 4)).astype(np.float16) for _ in range(8)]
    flips = draws.uniform(0, "flip", epochs, ids) < 0.5
    for i, sample in enumerate(ids):
        expected = written[sample][int(flips[i])].astype(np.float32)
        assert np.array_equal(batch.moments[i].numpy(), expected)
        assert batch.y[i] == sample % 3
    assert batch.weight.tolist() == [1, 1, 1, 0]


def damaged(folder: str, workers: int) -> str:
    try:
        ledger(folder, 8, 4, workers, 0, 4)
    except distributed.RankError as e:
        return str(e)
    return "nothing"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_stops_all_ranks_with_its_name(tmp_path: Path, workers: int) -> None:
    make_latents(tmp_path, counts=(10, 10, 10))
    path = tmp_path / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    told = run_ranks(2, damaged, str(tmp_path), workers)
    assert told[0] == told[1]
    assert "shard-000001.tar" in told[0]
