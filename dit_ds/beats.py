"""Where a rank is: its main thread says so in a file, which the agent of its host reads.

A beat is progress, not life: a rank that is stopped, hangs in a collective or waits for storage
beats no more. Without an agent (plain `deepspeed`, tests) nothing happens here. Standard library
only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

PHASES = ("start", "compile", "step", "save", "sample")
FOLDER, LIMIT = "DIT_DS_BEATS", "DIT_DS_BEATS_LIMIT"  # environment, set by the agent
_SIZE = 160
_file: int | None = None
_count = 0


class Beat(NamedTuple):
    """What a rank said last: how often it beat, in which phase, at which step, doing what."""

    number: int
    phase: str
    step: int
    doing: str


def beat(phase: str, step: int = 0, doing: str = "") -> None:
    """Say that this rank's main thread has come here; takes microseconds."""
    global _count
    if _file is None:
        return
    _count += 1
    record = json.dumps([_count, phase, step, doing])
    os.pwrite(_file, record.ljust(_SIZE)[:_SIZE].encode(), 0)


def begin() -> None:
    """First of all in a rank: beats count from here, and the rank ends when its agent is silent."""
    global _file
    if FOLDER not in os.environ:
        return
    folder = Path(os.environ[FOLDER])
    _file = os.open(folder / os.environ["RANK"], os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    limit = float(os.environ[LIMIT])
    work = (folder, limit, os.getppid())
    threading.Thread(target=_end_without_agent, args=work, daemon=True).start()
    beat("start")


def read(folder: Path, rank: int) -> Beat | None:
    """The last beat of a rank; None if there is none, or it is being written."""
    try:
        return Beat(*json.loads((folder / str(rank)).read_text()))
    except (OSError, ValueError, TypeError):
        return None


class Pulse:
    """The agent's own beats, for its ranks."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "agent", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._count = 0

    def beat(self) -> None:
        """The agent is alive."""
        self._count += 1
        os.pwrite(self._file, b"%020d" % self._count, 0)


def _end_without_agent(folder: Path, limit: float, agent: int) -> None:
    # Counted, as the clock also goes on while this process is suspended.
    silent, last = 0.0, b""
    while silent <= limit:
        time.sleep(1)
        try:
            now = (folder / "agent").read_bytes()
        except OSError:
            now = b""
        silent, last = (0.0, now) if now != last else (silent + 1, last)
    print(
        f"error: the agent of this host has been silent for {limit:.0f} seconds; ending with it",
        file=sys.stderr,
        flush=True,
    )
    if os.getppid() == agent:
        os.kill(agent, signal.SIGKILL)  # one that is only stopped; its other ranks end with it
    os._exit(1)
