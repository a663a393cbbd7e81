"""Data sets at URLs, over a real HTTP server that is made to fail, stall, cut off and lie."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dit_ds import remote, transfer
from dit_ds.manifest import Folder, Manifest, ShardError
from dit_ds.remote import Cache, Prefetcher, Remote
from dit_ds.shards import ShardReader
from tests.conftest import make_latents

fork = multiprocessing.get_context("fork")
GB = 10**9
TRICKLE = 12  # pieces, a tenth of a second apart


class Origin(ThreadingHTTPServer):
    """Serves a folder, over connections that stay open.

    `faults[name]` is used up by the GETs of that file, one each. A number is an HTTP status;
    "stall" stops in the middle; "cut" closes there, "cut unsaid" without having told the length;
    "altered" flips a bit; "trickle" is slow but steady. `sizes` are lies to who asks for a length.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[int | str]] = {}
        self.sizes: dict[str, int] = {}
        self.gets: list[str] = []
        self.connections: set[object] = set()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Origin
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self)

    def finish(self) -> None:
        self.server.connections.discard(self)
        with contextlib.suppress(ConnectionError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        self.answer(self.path[1:], None)

    def do_GET(self) -> None:
        name = self.path[1:]
        self.server.gets.append(name)
        faults = self.server.faults.get(name)
        self.answer(name, faults.pop(0) if faults else "")

    def answer(self, name: str, fault: int | str | None) -> None:
        path = self.server.folder / name
        status = fault if isinstance(fault, int) else 200 if path.exists() else 404
        content = path.read_bytes() if status == 200 else b""
        if fault == "altered":
            content = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
        self.send_response(status)
        if fault == "cut unsaid":
            self.send_header("Connection", "close")
        else:
            size = len(content) if fault is not None else self.server.sizes.get(name, len(content))
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if fault is None:
            return
        half = len(content) // 2
        if fault == "stall":
            self.wfile.write(content[:half])
            self.wfile.flush()
            self.server.ended.wait()
        elif fault in ("cut", "cut unsaid"):
            self.wfile.write(content[:half])
            self.close_connection = True
        elif fault == "trickle":
            for part in np.array_split(np.frombuffer(content, np.uint8), TRICKLE):
                self.wfile.write(part.tobytes())
                self.wfile.flush()
                self.server.ended.wait(0.1)
        else:
            self.wfile.write(content)


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Origin]:
    """A server of a data set of ten shards, and short waits between attempts."""
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    make_latents(tmp_path / "origin", counts=(6,) * 10)
    with Origin(tmp_path / "origin") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", GB)


def read(store: Remote | Folder, manifest: Manifest, number: int = 0) -> np.ndarray:
    """All moments of a shard, by the reader that training uses."""
    info = manifest.shards[number]
    rows = np.arange(info.num_samples)
    return ShardReader(store, info, manifest).moments(rows, np.zeros_like(rows))


def held(cache: Cache) -> set[str]:
    return set(os.listdir(cache.folder))


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def in_child(function: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    """A forked process that exits with 0 if the function returns."""
    process = fork.Process(target=function)
    process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess) -> None:
    process.kill()
    process.join()


def awaited(path: Path) -> bool:
    """Whether somebody waits for the lock on a file."""
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(f":{path.stat().st_ino} " in line for line in waiting)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_data_set_at_a_url_reads_like_its_folder(origin: Origin, cache: Cache) -> None:
    store = Remote(origin.url + "/", cache)
    manifest = store.manifest()
    store.check(manifest)
    assert manifest == Manifest.load(origin.folder)
    for number in range(10):
        found = read(store, manifest, number)
        assert np.array_equal(found, read(Folder(origin.folder), manifest, number))
    assert held(cache) == {shard.sha256 for shard in manifest.shards}
    origin.gets.clear()
    read(Remote(origin.url, cache), manifest)
    assert origin.gets == []  # from the cache
    manifest.model_copy(update={"class_names": ("x", "y", "z")}).save(origin.folder)
    assert store.manifest().class_names == ("x", "y", "z")  # never from the cache


def test_many_processes_fetch_a_shard_once(origin: Origin, cache: Cache) -> None:
    """Forked after their parent has used http, as loader workers are; and they end promptly."""
    store = Remote(origin.url, cache)
    manifest = store.manifest()
    until(lambda: not origin.connections, 5)  # nothing is left open that children would inherit
    origin.gets.clear()
    origin.faults[manifest.shards[0].name] = ["trickle"]
    began = time.monotonic()
    children = [in_child(lambda: read(store, manifest)) for _ in range(5)]
    for child in children:
        child.join(20)
    assert [child.exitcode for child in children] == [0] * 5
    assert time.monotonic() - began < 10
    assert origin.gets == [manifest.shards[0].name]
    store.manifest()  # and the parent's own http still works


def test_the_cache_keeps_its_bound_and_what_was_used_last(origin: Origin, tmp_path: Path) -> None:
    manifest = Manifest.load(origin.folder)
    size = manifest.shards[0].num_bytes
    store = Remote(origin.url, Cache(tmp_path / "cache", 3 * size + 100))
    for number in (0, 1, 2, 0, 3):
        read(store, manifest, number)
    assert held(store.cache) == {manifest.shards[i].sha256 for i in (0, 2, 3)}
    with pytest.raises(ValueError, match=r"data.cache_gb=.*two windows"):
        Remote(origin.url, Cache(tmp_path / "cache", size - 1)).check(manifest)
    with pytest.raises(ValueError, match=r"data.cache_gb=.*shard-000005.tar"):
        read(Remote(origin.url, Cache(tmp_path / "cache", size - 1)), manifest, 5)


def test_downloads_at_once_wait_for_room(origin: Origin, tmp_path: Path) -> None:
    """The bound counts what is on its way: with room for one shard, the second comes afterwards."""
    manifest = Manifest.load(origin.folder)
    store = Remote(origin.url, Cache(tmp_path / "cache", manifest.shards[0].num_bytes))
    origin.faults[manifest.shards[0].name] = ["trickle"]
    first = in_child(lambda: read(store, manifest, 0))
    until(lambda: manifest.shards[0].name in origin.gets)
    second = in_child(lambda: read(store, manifest, 1))
    first.join(20)
    assert manifest.shards[1].name not in origin.gets or held(store.cache).isdisjoint(
        {manifest.shards[0].sha256}
    )
    second.join(20)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert held(store.cache) == {manifest.shards[1].sha256}


def test_eviction_harms_no_reader(origin: Origin, tmp_path: Path) -> None:
    manifest = Manifest.load(origin.folder)
    store = Remote(origin.url, Cache(tmp_path / "cache", manifest.shards[0].num_bytes))
    reader = ShardReader(store, manifest.shards[0], manifest)
    rows = np.arange(6)
    before = reader.moments(rows, rows * 0)
    read(store, manifest, 1)
    assert held(store.cache) == {manifest.shards[1].sha256}
    assert np.array_equal(reader.moments(rows, rows * 0), before)


def test_a_killed_download_leaves_nothing_that_counts(origin: Origin, tmp_path: Path) -> None:
    manifest = Manifest.load(origin.folder)
    first, second, third = (shard.sha256 for shard in manifest.shards[:3])
    # What the dead had reserved is free again, or there would be no room.
    cache = Cache(tmp_path / "cache", 2 * manifest.shards[0].num_bytes)
    store = Remote(origin.url, cache)
    origin.faults = {shard.name: ["stall"] for shard in manifest.shards[:2]}
    children = [in_child(lambda n=n: read(store, manifest, n)) for n in (0, 1)]  # type: ignore[misc]
    until(lambda: sum(p.stat().st_size > 0 for p in cache.folder.glob("*.part")) == 2)
    kill(children[0])
    left, live = ({name for name in held(cache) if name[:64] == sha} for sha in (first, second))
    assert len(left) == len(live) == 2 and first not in left
    read(store, manifest, 2)  # cleans up after the dead and leaves the living alone
    assert held(cache) == {third, *live}
    kill(children[1])
    read(store, manifest, 1)
    assert held(cache) == {second, third}


def test_a_fork_in_mid_download_takes_no_lock_along(origin: Origin, cache: Cache) -> None:
    store, manifest = Remote(origin.url, cache), Manifest.load(origin.folder)
    origin.faults[manifest.shards[0].name] = ["trickle"]
    threads = [threading.Thread(target=read, args=(store, manifest), daemon=True) for _ in "ab"]
    for thread in threads:
        thread.start()
    until(lambda: list(cache.folder.glob("*.part")))
    child = in_child(signal.pause)
    try:
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    finally:
        kill(child)


def test_a_lock_is_held_by_one_although_its_file_goes(tmp_path: Path) -> None:
    """Who waited for the removed file must not believe to hold the lock when a third asks."""
    path, waiting, done = tmp_path / "lock", threading.Event(), threading.Event()

    def wait() -> None:
        with remote._locked(path):
            waiting.set()
            done.wait(10)

    with remote._locked(path):
        second = threading.Thread(target=wait)
        second.start()
        until(lambda: awaited(path))
    assert waiting.wait(10)
    with remote._locked(path, wait=False) as held_too:
        assert held_too is None
    done.set()
    second.join()
    assert not path.exists()


@pytest.mark.parametrize("fault", [500, 429, "cut", "cut unsaid", "altered", "stall"])
def test_what_fails_is_tried_again(
    origin: Origin, cache: Cache, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.5)
    manifest = Manifest.load(origin.folder)
    name = manifest.shards[0].name
    origin.faults[name] = [fault, fault]
    found = read(Remote(origin.url, cache), manifest)
    assert np.array_equal(found, read(Folder(origin.folder), manifest))
    assert origin.gets == [name] * 3
    assert held(cache) == {manifest.shards[0].sha256}


@pytest.mark.parametrize(
    "fault, told",
    [
        (503, "503"),
        ("cut unsaid", "bytes came, not the"),
        ("altered", "what came has the sha256"),
        ("stall", "no byte came|Timeout on reading"),
    ],
)
def test_what_fails_for_good_names_the_url_and_the_reason(
    origin: Origin, cache: Cache, fault: int | str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(transfer, "NUM_ATTEMPTS", 3)
    manifest = Manifest.load(origin.folder)
    name = manifest.shards[0].name
    origin.faults[name] = [fault] * 3
    with pytest.raises(ShardError, match=rf"{origin.url}/{name}: .*3 attempts.*({told})"):
        read(Remote(origin.url, cache), manifest)
    assert origin.gets == [name] * 3
    assert held(cache) == set()


def test_a_stall_is_noticed_whatever_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An FTP server that takes the call and says nothing; its client would wait 30 s."""
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(transfer, "NUM_ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ftp://127.0.0.1:{silent.getsockname()[1]}/file"
        with pytest.raises(ShardError, match=f"{url}: .*no byte came"):
            transfer.download(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_slow_but_steady_transfer_is_not_cut_off(
    origin: Origin, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp ends every transfer after a total time, by default 5 minutes."""
    import aiohttp.client

    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.3))
    monkeypatch.setattr(transfer, "STALL_SECONDS", 1.0)
    manifest = Manifest.load(origin.folder)
    origin.faults[manifest.shards[0].name] = ["trickle"]
    began = time.monotonic()
    read(Remote(origin.url, cache), manifest)
    assert time.monotonic() - began > 1.0 and len(origin.gets) == 1


def test_what_is_not_there_is_told_at_once(
    origin: Origin, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 100.0)  # would not end in time
    store, manifest = Remote(origin.url, cache), Manifest.load(origin.folder)
    origin.sizes[manifest.shards[-1].name] = 17
    with pytest.raises(ShardError, match=r"shard-000009.tar: has 17 bytes, not the \d+"):
        store.check(manifest)
    (origin.folder / manifest.shards[0].name).unlink()
    for act in (lambda: read(store, manifest), lambda: store.check(manifest)):
        with pytest.raises(ShardError, match=r"shard-000000.tar: there is no such file"):
            act()
    with pytest.raises(ValueError, match=r"/elsewhere/manifest.json: there is no such file"):
        Remote(origin.url + "/elsewhere", cache).manifest()
    origin.faults["manifest.json"] = [403]
    with pytest.raises(ValueError, match=r"manifest.json: .*403.*who may read it"):
        store.manifest()
    with pytest.raises(ValueError, match=r'ossfs.*pip install "fsspec\[oss\]"'):
        Remote("oss://bucket/set", cache).manifest()
    with pytest.raises(ValueError, match="nonsense://set/manifest.json: .*not known"):
        Remote("nonsense://set", cache).manifest()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/cache: cannot be made"):
        Cache(tmp_path / "file" / "cache", GB)


def test_a_server_that_is_down_is_not_a_missing_file(
    origin: Origin, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "NUM_ATTEMPTS", 2)
    manifest = Manifest.load(origin.folder)
    origin.server_close()
    with pytest.raises(ShardError, match="after 2 attempts: .*onnect"):
        Remote(origin.url, cache).check(manifest)


def test_a_damaged_copy_is_fetched_anew(origin: Origin, cache: Cache) -> None:
    store, manifest = Remote(origin.url, cache), Manifest.load(origin.folder)
    expected = read(store, manifest)
    info = manifest.shards[0]
    with open(cache.folder / info.sha256, "r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    origin.gets.clear()
    assert np.array_equal(read(store, manifest), expected)
    assert origin.gets == [info.name]
    # Another process that had opened the damaged copy does not remove the sound one.
    other = Remote(origin.url, cache)
    assert other.discard(info.name, info.sha256)
    other.open(info.name, info.sha256).close()
    assert origin.gets == [info.name]
    assert not other.discard(info.name, info.sha256)  # once: a loop would have no end


def test_a_shard_that_is_bad_at_its_origin_is_an_error(origin: Origin, cache: Cache) -> None:
    """Its checksum is right and its content is not: another copy would be the same."""
    manifest = Manifest.load(origin.folder)
    shard = bytearray((origin.folder / manifest.shards[0].name).read_bytes())
    shard[1536:2048] = b"9" + bytes(511)  # a label that no class has
    (origin.folder / "bad.tar").write_bytes(shard)
    digest = hashlib.sha256(shard).hexdigest()
    bad = manifest.shards[0].model_copy(update={"name": "bad.tar", "sha256": digest})
    with pytest.raises(ShardError, match=f"{origin.url}/bad.tar: sample"):
        read(Remote(origin.url, cache), manifest.model_copy(update={"shards": (bad,)}))


def test_a_full_disk_names_folder_and_space(origin: Origin, tmp_path: Path) -> None:
    manifest = Manifest.load(origin.folder)
    store = Remote(origin.url, Cache(tmp_path / "cache", 1 << 62))
    read(store, manifest, 1)
    first = manifest.shards[0]
    with pytest.raises(ShardError, match=r"disk of .*/cache, where [\d,]+ bytes are free"):
        store.open(first.name, first.sha256, 1 << 60)
    assert held(store.cache) == {manifest.shards[1].sha256}  # evicting it would not have helped
    origin.sizes[first.name] = 1 << 60  # the origin is asked where the size is not known
    with pytest.raises(ShardError, match=r"disk of .*/cache, where [\d,]+ bytes are free"):
        store.open(first.name, first.sha256)
    del origin.sizes[first.name]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # what a full disk does
    try:
        with pytest.raises(ShardError, match=r"disk of .*/cache, where [\d,]+ bytes are free"):
            read(store, manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert held(store.cache) == {manifest.shards[1].sha256}


def test_memory_urls_are_what_they_were_at_the_fork(origin: Origin, cache: Cache) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(origin.folder), "/latents", recursive=True)
    store = Remote("memory://latents", cache)
    manifest = store.manifest()
    store.check(manifest)
    child = in_child(lambda: read(store, manifest, 3))
    child.join(20)
    assert child.exitcode == 0
    assert np.array_equal(read(store, manifest, 3), read(Folder(origin.folder), manifest, 3))
    memory.rm("/latents", recursive=True)


def test_paths_and_urls_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert all(map(remote.is_url, ("s3://b/x", "file:///x", "hf://datasets/a/b", "memory://x")))
    assert not any(map(remote.is_url, ("x", "/x/y", "./a:b", "~/x")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    store = remote.open_store("s3://bucket/set", None, 1.5)
    assert isinstance(store, Remote) and store.where("a.tar") == "s3://bucket/set/a.tar"
    assert (store.cache.folder, store.cache.max_bytes) == (tmp_path / "home/dit_ds", 1.5e9)
    store = remote.open_store("s3://bucket/set", str(tmp_path / "fast"), 1)
    assert isinstance(store, Remote) and store.cache.folder == tmp_path / "fast"
    assert isinstance(remote.open_store("/data/set", None, 1), Folder)


def prefetcher(store: Remote, manifest: Manifest, horizon: int, steps: int = 1) -> Prefetcher:
    """One shard for so many steps, the last first."""
    return Prefetcher(
        store,
        manifest,
        lambda step: [9 - step // steps % 10],
        first_step=0,
        last_step=20,
        horizon=horizon,
    )


def test_the_prefetcher_goes_ahead_in_order_within_its_horizon(
    origin: Origin, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_NUM_PARALLEL", 1)
    store, manifest = Remote(origin.url, cache), Manifest.load(origin.folder)
    names = [shard.name for shard in manifest.shards[::-1]]
    with prefetcher(store, manifest, 3) as fetching:
        until(lambda: len(origin.gets) == 4)  # steps 0 to 3
        fetching.advance(2)
        until(lambda: len(origin.gets) == 6)
        assert origin.gets == names[:6]
        (cache.folder / manifest.shards[9].sha256).unlink()  # evicted
        fetching.advance(7)  # up to step 10, the second epoch's first
        until(lambda: len(origin.gets) == 11)
        assert origin.gets == [*names, names[0]]


def test_a_failed_prefetch_is_one_warning_and_the_readers_business(
    origin: Origin, cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    store, manifest = Remote(origin.url, cache), Manifest.load(origin.folder)
    for shard in manifest.shards[8:]:
        (origin.folder / shard.name).rename(origin.folder / f"{shard.name}.away")
    with prefetcher(store, manifest, 9):
        until(lambda: len(held(cache) & {s.sha256 for s in manifest.shards}) == 8)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "not fetched ahead" in told[0] and "no such file" in told[0]
    with pytest.raises(ShardError, match="no such file"):
        read(store, manifest, 9)


def test_a_shard_takes_one_download_however_many_steps_need_it(
    origin: Origin, cache: Cache
) -> None:
    store, manifest = Remote(origin.url, cache), Manifest.load(origin.folder)
    origin.faults = {shard.name: ["stall"] for shard in manifest.shards}
    with prefetcher(store, manifest, horizon=19, steps=5):
        until(lambda: len(origin.gets) == 4)
    assert set(origin.gets) == {shard.name for shard in manifest.shards[6:]}


def test_a_prefetcher_closes_fast_and_survives_the_signals_of_its_rank(
    origin: Origin, cache: Cache
) -> None:
    store, manifest = Remote(origin.url, cache), Manifest.load(origin.folder)
    origin.faults = {shard.name: ["stall"] for shard in manifest.shards[:9]}
    with prefetcher(store, manifest, 9) as fetching:
        until(lambda: manifest.shards[9].sha256 in held(cache) and len(origin.gets) == 5)
        process = fetching._process
        assert process.pid
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGUSR1)
        process.join(0.3)
        assert process.is_alive()
        began = time.monotonic()
    assert time.monotonic() - began < 1 and not process.is_alive()
    assert held(cache) == {manifest.shards[9].sha256}


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_a_prefetcher_ends_with_its_parent(
    origin: Origin, cache: Cache, end: signal.Signals | None
) -> None:
    """Also with one that leaves by an error, without closing it."""
    store, manifest = Remote(origin.url, cache), Manifest.load(origin.folder)
    origin.faults = {shard.name: ["stall"] for shard in manifest.shards}
    pids = fork.SimpleQueue()

    def rank() -> None:
        pids.put(prefetcher(store, manifest, 9)._process.pid)
        until(lambda: list(cache.folder.glob("*.part")))  # it is at work
        if end:
            signal.pause()
        sys.exit(3)

    parent = in_child(rank)
    pid = pids.get()
    if end:
        assert parent.pid
        os.kill(parent.pid, end)
    parent.join(10)
    assert parent.exitcode == (-end if end else 3)
    until(lambda: ended(pid))
