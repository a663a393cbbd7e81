"""Processes of this host: none outlives its parent, and none is forgotten. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)  # here: nothing may be loaded between fork and exec
_PDEATHSIG, _CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def die_with_parent() -> None:
    """In a child: the kernel kills it when its parent ends, however that ends.

    For `preexec_fn`. The parent is the thread that made the child, so that must be one which lasts.
    """
    _libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """What this process's descendants leave behind becomes its child, not that of init."""
    _libc.prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)


def state(pid: int) -> str:
    """A letter: R runs, S sleeps, T is stopped, D sleeps uninterruptibly; Z or empty: gone."""
    return _stat(pid)[0]


def descendants(of: int) -> list[int]:
    """Ids of all processes that a process started, and they, and so on."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            children.setdefault(_stat(int(entry))[1], []).append(int(entry))
    found, todo = [], [of]
    while todo:
        more = children.get(todo.pop(), [])
        found += more
        todo += more
    return found


def kill_descendants(seconds: float) -> list[str]:
    """Kill them all at once; those still there after `seconds` are described, a line each."""
    deadline = time.monotonic() + seconds
    while True:
        left = [pid for pid in descendants(os.getpid()) if state(pid) not in ("", "Z")]
        for pid in left:
            with contextlib.suppress(OSError):  # gone, or another user's
                os.kill(pid, signal.SIGKILL)
        if not left or time.monotonic() > deadline:
            return [_described(pid) for pid in left]
        time.sleep(0.05)


def _stat(pid: int) -> tuple[str, int]:
    """State and parent."""
    try:
        # A name in it may be cut in the middle of a character.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return "", 0
    return fields[0].decode(), int(fields[1])


def _described(pid: int) -> str:
    command = where = ""
    with contextlib.suppress(OSError):
        command = (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")[:80]
        )
        where = Path(f"/proc/{pid}/wchan").read_text()
    return (
        f"process {pid}, state {state(pid) or 'gone'}{f' in {where}' if where else ''}: {command}"
    )
