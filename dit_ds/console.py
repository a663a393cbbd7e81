"""What is printed while others wait for us: by a thread, so that no reader can hold them up.

A terminal that is paused (Ctrl-S), or a pipe that nobody empties, would stop the supervisor, and
with it, after a while, the whole training. Standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time

_MOST_WAITING = 2**20  # characters; what comes on top of it while nobody reads is left out
_LAST_SECONDS = 5.0  # that the end waits for a reader
_told: queue.SimpleQueue[str] = queue.SimpleQueue()
_put = _written = 0  # characters; each is counted by one thread alone
_begun = threading.Lock()


def show(text: str) -> None:
    """Print, where and when anyone reads; returns at once. For the main thread."""
    global _put
    if _begun.acquire(blocking=False):
        threading.Thread(target=_write, daemon=True).start()
        atexit.register(flush)
    if _put - _written < _MOST_WAITING:
        _put += len(text)
        _told.put(text)


def _write() -> None:
    global _written
    while True:
        text = _told.get()
        # What the locale cannot write, is escaped. Not through sys.stdout: its lock is not to be
        # held by a thread that waits for a reader when the interpreter ends.
        data = text.encode(sys.stdout.encoding or "utf-8", "backslashreplace")
        with contextlib.suppress(OSError):  # a terminal that was closed
            while data:
                data = data[os.write(1, data) :]
        _written += len(text)


def flush() -> None:
    """Wait until all is printed, but no longer than a reader may be waited for."""
    over = time.monotonic() + _LAST_SECONDS
    while _written < _put and time.monotonic() < over:
        time.sleep(0.01)
