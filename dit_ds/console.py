"""What is printed while others wait for us: by a thread, so that no reader can hold them up.

A terminal that is paused (Ctrl-S), or a pipe that nobody empties, would stop the supervisor, and
with it, after a while, the whole training. Standard library only.
"""

from __future__ import annotations

import atexit
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
        atexit.register(_finish)
    if _put - _written < _MOST_WAITING:
        _put += len(text)
        _told.put(text)


def _write() -> None:
    global _written
    while True:
        text = _told.get()
        # Whatever the locale can write, and also when the terminal was closed.
        try:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except (OSError, ValueError):
            pass
        _written += len(text)


def _finish() -> None:
    over = time.monotonic() + _LAST_SECONDS
    while _written < _put and time.monotonic() < over:
        time.sleep(0.01)
