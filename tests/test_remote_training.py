"""Training from a URL is training: the same numbers, each shard fetched once for a machine."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dit_ds.loader import Split
from dit_ds.manifest import Manifest
from dit_ds.order import Order
from dit_ds.remote import Cache, Remote
from dit_ds.samples import Samples
from tests.conftest import FP32, make_latents, run_ranks
from tests.runs import arguments, assert_same_bits, state_of, train, write_json
from tests.test_remote import Origin


@pytest.fixture
def origin(tiny: dict[str, Any]) -> Iterator[Origin]:
    with Origin(Path(tiny["tree"]["data"]["path"])) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def overrides(origin: Origin, tmp_path: Path, *more: str) -> list[str]:
    return [f"data.path={origin.url}", f"data.cache={tmp_path / 'cache'}", "data.workers=1", *more]


def test_two_ranks_train_from_a_url_as_from_a_folder(
    tiny: dict[str, Any], origin: Origin, tmp_path: Path
) -> None:
    ds = write_json(tmp_path / "ds.json", FP32)
    # Ten steps of 12 are more than an epoch of 100; then a resume.
    run_ranks(2, train, *arguments(tiny, ds, "train.steps=12"))
    expected = state_of(tiny["run"], 12)
    tiny["run"] = tmp_path / "remote"
    for steps in (9, 12):
        more = overrides(origin, tmp_path, f"train.steps={steps}")
        run_ranks(2, train, *arguments(tiny, ds, *more))
    assert_same_bits(state_of(tiny["run"], 12), expected)
    shards = Counter(name for name in origin.gets if name.endswith(".tar"))
    assert shards == {f"shard-{i:06d}.tar": 1 for i in range(3)}


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Manifest]:
    """320 shards of 3 to 5 samples at memory://shards."""
    counts = tuple(np.random.default_rng(0).integers(3, 6, 320).tolist())
    manifest = make_latents(tmp_path / "made", counts=counts)
    filesystem = fsspec.filesystem("memory")
    for path in (tmp_path / "made").iterdir():
        filesystem.pipe_file(f"/shards/{path.name}", path.read_bytes())
    yield manifest
    filesystem.rm("/shards", recursive=True)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_a_host_fetches_its_share(in_memory: Manifest, tmp_path: Path, hosts: int) -> None:
    sizes = [shard.num_samples for shard in in_memory.shards]
    split = Split.of(global_batch=64, world_size=hosts, micro_batch=64)
    for host in range(hosts):
        store = Remote("memory://shards", Cache(tmp_path / f"host{host}", 10**9))
        order = Order(sizes, global_batch=64, lanes=8, window=4, seed=0)
        samples = Samples(store, in_memory, seed=0, flip=0.5)
        for step in range(order.num_samples // 64):  # an epoch
            samples.read(*order.batch(step, *split.slice(host)), 64 // hosts)
        fetched = len([path for path in store.cache.folder.iterdir() if len(path.name) == 64])
        assert fetched <= 1.1 * 320 / hosts
    total = sum(1 for host in range(hosts) for _ in (tmp_path / f"host{host}").glob("?" * 64))
    assert total >= 320 - 8  # the last step of the epoch is another one's first


def test_evicted_shards_give_their_space_back(in_memory: Manifest, tmp_path: Path) -> None:
    num_bytes = sum(shard.num_bytes for shard in in_memory.shards[:40])
    store = Remote("memory://shards", Cache(tmp_path / "cache", num_bytes))
    samples = Samples(store, in_memory, seed=0, flip=0.5, max_open=8)
    order = Order(
        [shard.num_samples for shard in in_memory.shards],
        global_batch=64,
        lanes=2,
        window=4,
        seed=0,
    )
    for step in range(order.num_samples // 64):
        samples.read(*order.batch(step), 64)
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if exists(fd)]
    assert len([name for name in files if str(tmp_path) in name]) == 8
    assert len(list(store.cache.folder.glob("?" * 64))) <= 48


def exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_shard_that_cannot_be_had_stops_all_ranks_with_its_url(
    tiny: dict[str, Any], origin: Origin, tmp_path: Path
) -> None:
    origin.faults["shard-000001.tar"] = [403] * 9
    ds = write_json(tmp_path / "ds.json", FP32)
    args = arguments(tiny, ds, *overrides(origin, tmp_path))
    outputs = run_ranks(2, train, *args, expect=2)
    assert f"error: {origin.url}/shard-000001.tar" in outputs[0] and "403" in outputs[0]


def test_a_cache_too_small_for_the_windows_is_refused_before_the_first_step(
    tiny: dict[str, Any], origin: Origin, tmp_path: Path
) -> None:
    ds = write_json(tmp_path / "ds.json", FP32)
    more = overrides(origin, tmp_path, "data.cache_gb=0.00015")
    outputs = run_ranks(2, train, *arguments(tiny, ds, *more), expect=2)
    assert "data.cache_gb=0.00015 does not hold two windows of this machine's 4 lanes" in outputs[0]
    assert "set data.cache_gb=0.1\n" in outputs[0]
    assert "Traceback" not in outputs[0]
    # What was refused has not fixed the run's settings.
    run_ranks(2, train, *arguments(tiny, ds, *overrides(origin, tmp_path), "data.window=1"))


def test_a_url_without_a_data_set_is_told(
    tiny: dict[str, Any], origin: Origin, tmp_path: Path
) -> None:
    ds = write_json(tmp_path / "ds.json", FP32)
    more = overrides(origin, tmp_path, f"data.path={origin.url}/nothing")
    (output,) = run_ranks(1, train, *arguments(tiny, ds, *more), expect=2)
    assert f"{origin.url}/nothing/manifest.json" in output and "Traceback" not in output
