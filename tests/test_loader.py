"""The order is a permutation in every epoch, and nobody but the step decides what comes."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ds import adopt, distributed, draws
from dit_ds.latents import LatentSpace
from dit_ds.loader import Loader, Split
from dit_ds.manifest import Folder, Manifest, ShardInfo
from dit_ds.order import VERSION, Order
from dit_ds.samples import MicroBatch, Samples
from dit_ds.shards import ShardReader
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
    folder: str,
    batch: int,
    micro: int,
    workers: int,
    first: int,
    last: int,
    shutdown: bool = True,
    alone: bool = False,
) -> list[list[tuple[int, int, int, str]]]:
    """For each step: (epoch, sample, class, hash of data and draws) of this rank's samples."""
    if not alone:
        distributed.init()
    manifest = Manifest.load(folder)
    split = Split.of(global_batch=batch, world_size=distributed.world_size(), micro_batch=micro)
    steps = []
    with Loader(
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
    ) as loader:
        for _ in range(first, last):
            micros = loader.next()
            assert len(micros) == split.num_micro
            steps.append([row for m in micros for row in rows(m)])
    if shutdown:
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


def ledgers(folder: str, batch: int, last: int) -> dict[str, list]:
    """The ledger for all workers and micro-batches, and from several first steps, of this rank."""
    found = {}
    for workers in (0, 1, 3):
        for micro in (2, 8):
            # From the beginning, and from a step of its own for each: in all epochs, at their ends.
            for first in (0, 1 + (workers * 2 + micro // 8) * 2):
                steps = ledger(folder, batch, micro, workers, first, last, shutdown=False)
                found[f"{workers} {micro} {first}"] = steps
    distributed.shutdown()
    return found


def test_ranks_workers_micro_batches_and_resumes_change_nothing(tmp_path: Path) -> None:
    make_latents(tmp_path, counts=(13, 7, 30))
    folder, steps = str(tmp_path), 18
    alone = joined(run_ranks(1, ledger, folder, 12, 12, 0, 0, steps))
    assert [len(step) for step in alone] == [12] * steps
    for epoch in range(4):
        seen = [row[1] for step in alone for row in step if row[0] == epoch]
        assert sorted(seen) == list(range(50))
    for world in (1, 2, 3, 4):
        ranks = run_ranks(world, ledgers, folder, 12, steps)
        for how in ranks[0]:
            first = int(how.split()[2])
            assert joined([rank[how] for rank in ranks]) == alone[first:], (world, how)
    assert joined(run_ranks(5, ledger, folder, 12, 12, 0, 7, steps)) == alone[7:]


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


@pytest.mark.parametrize("values", ["moments", "latents", "scaled_latents"])
def test_shards_of_others_are_read_as_latents_of_the_model(
    tmp_path: Path, values: Literal["moments", "latents", "scaled_latents"]
) -> None:
    rng = np.random.default_rng(0)
    channels = 8 if values == "moments" else 4
    stored = rng.normal(size=(9, channels, 4, 4)).astype(np.float32)
    with tarfile.open(tmp_path / "theirs.tar", "w") as tar:
        for i, array in enumerate(stored):
            for name, content in ((f"s{i}.npy", npy(array)), (f"s{i}.cls", b"%d" % (i % 3))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    vae = adopt.Vae(scaling_factor=0.3, shift_factor=0.2, channels=4)
    adopt.index(tmp_path, vae=vae, image_size=32, values=values, workers=1)
    manifest = Manifest.load(tmp_path)
    samples = Samples(Folder(tmp_path), manifest, seed=0, flip=0.0)
    ids = np.array([7, 0, 4])
    batch = samples.read(np.zeros(3, np.int64), ids, 3)
    z = LatentSpace(0.3, 0.2).sample(batch.moments, batch.posterior).numpy()
    mean = stored[ids][:, :4]
    if values == "moments":
        std = np.exp(stored[ids][:, 4:] / 2)
        expected = (mean + std * batch.posterior.numpy() - 0.2) * 0.3
    else:
        expected = mean if values == "scaled_latents" else (mean - 0.2) * 0.3
    np.testing.assert_allclose(z, expected, atol=2e-6)
    assert batch.y.tolist() == [1, 0, 1]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _read_all(samples: Samples, first: int) -> None:
    """Read every shard, from another one on in each process."""
    num = samples.manifest.num_samples
    ids = np.roll(np.arange(num), -first)
    samples.values(ids, np.zeros(num, np.int64))


def test_each_shard_is_verified_by_one_of_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_latents(tmp_path / "data", counts=(30,) * 12)
    log, wrong = tmp_path / "log", ShardReader._wrong

    def told(self: ShardReader, data: memoryview) -> Iterator[str]:
        with open(log, "a") as file:
            file.write(f"{self._info.name}\n")
        return wrong(self, data)

    monkeypatch.setattr(ShardReader, "_wrong", told)
    folder = Folder(tmp_path / "data")
    samples = Samples(folder, folder.manifest(), seed=0, flip=0.0)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_read_all, args=(samples, first)) for first in (0, 0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(log.read_text().split()) == [f"shard-{i:06d}.tar" for i in range(12)]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -3 * 512])


def swap(path: Path) -> None:
    other = path.with_name("shard-000000.tar")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def fill_with_nothing(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip_a_bit, cut, swap, fill_with_nothing, Path.unlink])
@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_happens_to_a_shard_is_named(
    tmp_path: Path, damage: Callable[[Path], None], workers: int
) -> None:
    make_latents(tmp_path, counts=(10, 10, 10))
    damage(tmp_path / "shard-000001.tar")
    with pytest.raises(distributed.RankError, match="shard-00000[01].tar: .*; "):
        for _ in ledger(str(tmp_path), 8, 4, workers, 0, 4, alone=True):
            pass


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


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_a_host_reads_its_share_of_the_shards(hosts: int) -> None:
    sizes = np.random.default_rng(0).integers(50, 150, 640)  # 640 shards that do not divide
    order = Order(sizes.tolist(), global_batch=256, lanes=64, window=4, seed=0)
    steps = order.num_samples // 256
    for epoch in (0, 1):
        for host in range(hosts):
            places = (host * 256 // hosts, (host + 1) * 256 // hosts)
            first = epoch * steps + 1
            ids = np.concatenate([order.batch(s, *places)[1] for s in range(first, first + steps)])
            touched = np.unique(np.searchsorted(order.starts, ids, side="right") - 1)
            assert 0.9 * 640 / hosts < len(touched) < 1.1 * 640 / hosts


_A_BILLION = """
import json, os, sys
from dit_ds import loader  # what a rank has imported anyway
from dit_ds.manifest import Manifest
from dit_ds.order import Order
# What is resident now: the most that ever was may be the imports', and would hide ours.
before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
manifest = Manifest.load(sys.argv[1])
sizes = [s.num_samples for s in manifest.shards]
order = Order(sizes, global_batch=256, lanes=64, window=16, seed=0)
manifest.fingerprint
seen = set()
for step in range(2 * manifest.num_samples // 256, 2 * manifest.num_samples // 256 + 300):
    seen |= set(order.batch(step)[1].tolist())
# Of this program alone: ru_maxrss would count the process that started it.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
most = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps([manifest.num_samples, len(seen), (most - before) / 2**20]))
"""


def test_a_billion_samples_take_little_memory(tmp_path: Path) -> None:
    shards = tuple(
        ShardInfo(name=f"s-{i:06d}.tar", num_samples=10_000, num_bytes=1, sha256=f"{i:064x}")
        for i in range(100_000)
    )
    make_latents(tmp_path).model_copy(update={"shards": shards}).save(tmp_path)
    command = [sys.executable, "-c", _A_BILLION, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_samples, num_seen, mebibytes = json.loads(done.stdout)
    # Steps that straddle an epoch may repeat a few samples of the one before.
    assert num_samples == 10**9 and num_seen >= 300 * 256 - 256
    assert 50 < mebibytes < 200


def test_an_order_that_changes_is_another_version() -> None:
    """Change `order.VERSION` with what this pins, so that no run goes on in another order."""
    order = Order([7, 40, 13], global_batch=8, lanes=4, window=2, seed=5)
    ids = np.concatenate([order.batch(step)[1] for step in range(16)])
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    assert (VERSION, digest) == (
        2,
        "ace1c9bf6ae2bc38c2b3041b09484af4c42987eb5a0426260bb6042073b5111a",
    )
