"""Data sets at URLs: shards come whole into a bounded cache on this machine's disk.

The cache is one folder for all processes of a machine (ranks, loader workers, other trainings) and
all data sets: a file's name in it is its sha256. `Remote` is a `manifest.Store`; a `Prefetcher`
fetches ahead of the order.

A reader opens a shard once for a whole window of the order, and what was opened longest ago goes
first. So a cache that does not hold two windows of all ranks of a machine fetches shards twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from dit_ds import files
from dit_ds.manifest import MANIFEST_NAME, Folder, Manifest, ShardError, Store
from dit_ds.transfer import download, no_space, remote_size

_NUM_PARALLEL = 4  # downloads of one prefetcher
_POLL_SECONDS = 0.1
_SPARE_BYTES = 1 << 20  # of the disk, for what a file system adds to a file


def is_url(path: str) -> bool:
    """Whether a data set's path is a URL, `file://` included, rather than a folder."""
    return "://" in path


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/dit_ds`, usually `~/.cache/dit_ds`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_ds"


class Cache:
    """Files of at most `max_bytes` in `folder`, each under its sha256.

    Whoever fetches a file holds a lock on `SHA256.lock`, and the others who want it wait. The lock
    file says how many bytes are on their way: room is made for the whole file before it comes.
    A file that is open stays readable when it is evicted; the disk has its space back later.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be made ({error.strerror}); choose another folder for the cache"
            ) from error

    def open(self, url: str, sha256: str, num_bytes: int | None = None) -> BinaryIO:
        """A file, open for reading; fetched from `url` if it is not here.

        Its origin is asked for its size if that is not known.

        Raises:
            ShardError: it cannot be fetched, what came has another checksum, or it is larger than
                the whole cache.
        """
        file = self._opened(sha256)
        while file is None:
            with self._lock(sha256) as lock:
                assert lock is not None
                file = self._opened(sha256)  # others may have fetched it while we waited
                if file is None:
                    self._fetch(url, sha256, num_bytes, lock)
                    file = self._opened(sha256)
        return file

    def _opened(self, sha256: str) -> BinaryIO | None:
        try:
            file = open(self.folder / sha256, "rb")  # noqa: SIM115 - handed over
        except FileNotFoundError:
            return None
        os.utime(file.fileno())  # the time of its last use
        return file

    def discard(self, sha256: str) -> None:
        """Remove a damaged file, unless another process has already fetched it anew."""
        path = self.folder / sha256
        with self._lock(sha256):
            if path.exists() and files.sha256(path) != sha256:
                path.unlink(missing_ok=True)

    def check(self, url: str, num_bytes: int) -> None:
        """Raise a ShardError if a file of this size can never be here."""
        if num_bytes > self.max_bytes:
            raise ShardError(
                f"data.cache_gb={self.max_bytes / 1e9:g} cannot hold {url} of {num_bytes:,} bytes; "
                "it must hold two windows of them, 2 * data.window * lanes of this machine"
            )

    def clean(self) -> None:
        """Remove what killed downloads have left."""
        for sha256 in {name[:64] for name in os.listdir(self.folder) if len(name) > 64}:
            with self._lock(sha256, wait=False):
                pass

    @contextlib.contextmanager
    def _lock(self, sha256: str, *, wait: bool = True) -> Iterator[IO[bytes] | None]:
        """Be the one who may fetch a file; what is there of it is of one who was killed."""
        with _locked(self.folder / f"{sha256}.lock", wait=wait) as lock:
            if lock:
                for name in os.listdir(self.folder):
                    if name.startswith(f"{sha256}.") and name.endswith(".part"):
                        (self.folder / name).unlink(missing_ok=True)
            yield lock

    def _fetch(self, url: str, sha256: str, num_bytes: int | None, lock: IO[bytes]) -> None:
        # None where the protocol does not tell: is counted when it is here.
        size = remote_size(url) if num_bytes is None else num_bytes
        self.check(url, size or 0)
        while not self._reserve(url, size or 0, lock):
            time.sleep(_POLL_SECONDS)
        download(url, self.folder / sha256, num_bytes=size, sha256=sha256)

    def _reserve(self, url: str, num_bytes: int, lock: IO[bytes]) -> bool:
        """Evict until the file fits, and note its size; False if others' downloads are in the way.

        Raises a ShardError if not even an empty cache would leave enough space on the disk.
        """
        with _locked(self.folder / "lock"):
            self.clean()  # what is still locked below is alive
            # Locks before files: a download that ends in between is counted twice, never not.
            locks = [name for name in os.listdir(self.folder) if name.endswith(".lock")]
            reserved = sum(int(_text(self.folder / name) or 0) for name in locks)
            cached, arrived = [], 0
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                    found = entry.stat()
                    if len(entry.name) == 64:
                        cached.append((found.st_mtime_ns, found.st_size, entry.path))
                    elif entry.name.endswith(".part"):
                        arrived += found.st_size
            used = sum(size for _, size, _ in cached)
            free = shutil.disk_usage(self.folder).free - (reserved - arrived) - _SPARE_BYTES
            room = min(free, self.max_bytes - used - reserved)
            if room + used < num_bytes:
                if reserved:
                    return False
                raise no_space(url, self.folder)
            for _, size, path in sorted(cached):
                if room >= num_bytes:
                    break
                Path(path).unlink(missing_ok=True)
                room += size
            lock.write(b"%d" % num_bytes)
            lock.flush()
            return True


def _text(path: Path) -> str:
    """What a file holds; nothing if it has gone."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes] | None]:
    """Hold an empty lock file, for this thread alone; None if it is held and we do not wait.

    The kernel takes back what a killed process held. The file is removed in the end, so a lock
    counts only while its file is the one that lies there.
    """
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            try:
                if not _lies_there(file, path):
                    continue
                file.truncate(0)  # a killed process may have left its reservation
                try:
                    yield file
                finally:
                    path.unlink(missing_ok=True)
                return
            finally:
                # Closing would not do it if a process forked meanwhile had inherited the file.
                fcntl.flock(file, fcntl.LOCK_UN)


def _lies_there(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


class Remote:
    """A data set at a URL: a `manifest.Store`."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self._discarded: set[str] = set()

    def manifest(self) -> Manifest:
        """The manifest at the URL, fetched each time. Raises a ValueError if there is none."""
        url = self.where(MANIFEST_NAME)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MANIFEST_NAME
            download(url, path)
            return Manifest.parse(path.read_bytes(), url)

    def check(self, manifest: Manifest) -> None:
        """Compare the sizes of the first and the last shard, and that of the largest to the cache.

        All shards would take minutes where there are many; each is verified when it comes.
        """
        largest = max(manifest.shards, key=lambda shard: shard.num_bytes)
        self.cache.check(self.where(largest.name), largest.num_bytes)
        for shard in manifest.shards[:1] + manifest.shards[1:][-1:]:
            size = remote_size(self.where(shard.name))
            if size is not None and size != shard.num_bytes:
                raise ShardError(
                    f"{self.where(shard.name)}: has {size} bytes, not the {shard.num_bytes} of the "
                    "manifest; upload the shards and their manifest again"
                )

    def where(self, name: str) -> str:
        """The file's URL."""
        return f"{self.url}/{name}"

    def open(self, name: str, sha256: str, num_bytes: int | None = None) -> BinaryIO:
        """The file from the cache, fetched if it is not there. Raises as `Cache.open` does."""
        return self.cache.open(self.where(name), sha256, num_bytes)

    def discard(self, name: str, sha256: str) -> bool:
        """Have a damaged file fetched anew; False if that was done before, to no avail."""
        if sha256 in self._discarded:
            return False
        self._discarded.add(sha256)
        self.cache.discard(sha256)
        return True


class Prefetcher:
    """A process of its own that fetches shards ahead of the order, for one rank.

    Whatever it fails at is left to the reader, which fetches the shard itself and tells. It ends
    when it is closed, and by itself soon after its parent.

    Args:
        store, manifest: the data set.
        needs: the shard numbers of a step.
        first_step, last_step: of this training, [first_step, last_step).
        horizon: fetches for at most so many steps beyond the one that `advance` was told.
    """

    def __init__(
        self,
        store: Remote,
        manifest: Manifest,
        needs: Callable[[int], Iterable[int]],
        *,
        first_step: int,
        last_step: int,
        horizon: int,
    ) -> None:
        self._store, self._manifest, self._needs = store, manifest, needs
        self._steps, self._horizon = range(first_step, last_step), horizon
        fork = multiprocessing.get_context("fork")
        self._step = fork.RawValue(ctypes.c_int64, first_step)
        self._process = fork.Process(target=self._run, args=(os.getpid(),), daemon=True)
        self._process.start()

    def advance(self, step: int) -> None:
        """Tell that `step` is being trained. Never waits."""
        self._step.value = step

    def close(self) -> None:
        """End the process at once, in the middle of what it fetches."""
        self._process.kill()
        self._process.join()
        self._store.cache.clean()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, parent: int) -> None:
        gc.freeze()  # what the parent had is the parent's to finalize, and need not be searched
        # Its rank saves at these signals and may go on. SIGTERM ends it: the rank is about to end.
        for name in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        shards, lock, warned = self._in_order(), threading.Lock(), threading.Event()

        def fetch() -> None:
            while True:
                with lock:
                    number = next(shards, None)
                if number is None:
                    return
                shard = self._manifest.shards[number]
                try:
                    self._store.open(shard.name, shard.sha256, shard.num_bytes).close()
                except (ValueError, OSError) as error:
                    if not warned.is_set():
                        warned.set()
                        print(f"warning: not fetched ahead: {error}", file=sys.stderr, flush=True)

        threads = [threading.Thread(target=fetch, daemon=True) for _ in range(_NUM_PARALLEL)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(0)  # threads may be in the middle of a download

    def _in_order(self) -> Iterator[int]:
        """Shards in the order of need, each again if it was not needed for a horizon of steps."""
        asked: dict[int, int] = {}  # by shard, the last step that needs it
        for step in self._steps:
            while step > self._step.value + self._horizon:
                time.sleep(_POLL_SECONDS)
            for number in self._needs(step):
                if asked.get(number, step - self._horizon - 1) < step - self._horizon:
                    yield number
                asked[number] = step


def open_store(path: str, cache: str | None = None, cache_gb: float = 100.0) -> Store:
    """The store of a folder, or of a URL through the cache in the folder `cache`."""
    if not is_url(path):
        return Folder(path)
    folder = Path(cache) if cache else default_cache_folder()
    return Remote(path, Cache(folder, int(cache_gb * 1e9)))
