"""Worker processes: how they begin, and the same work on many shards with a progress bar."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends


def begin_worker(worker: int = 0) -> None:
    """Call first in a `DataLoader` worker: it leaves signals to its rank, and ends with it.

    `DataLoader` itself sees to one thread, and ends workers that wait; the kernel ends one that is
    stuck, in a read from a server that is gone.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    gc.freeze()  # what the rank had is the rank's to finalize, and need not be searched


def in_background(function: Callable[[], Result]) -> Future[Result]:
    """Call in a thread that nobody waits for at the exit, as a pool's would be."""
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def each(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    sizes: Sequence[int],
    workers: int | None = None,
) -> Iterator[Result]:
    """`function(job)` of each job, in order, from `workers` processes (default: one per core).

    sizes: bytes of each job, for the progress bar, which is there on terminals only.

    Raises:
        ValueError: a process was killed.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} is not at least 1")
    pool = ProcessPoolExecutor(
        max_workers=max(1, min(workers or len(os.sched_getaffinity(0)), len(jobs))),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start,
    )
    # disable=None is tqdm's word for "only on a terminal".
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None)
    try:
        for result, size in zip(pool.map(function, jobs), sizes, strict=True):
            yield result
            bar.update(size)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, for want of memory most likely; give fewer workers"
        ) from error
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
