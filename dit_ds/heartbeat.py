"""No rank waits for one that is gone: they hear each other in a `distributed.shared_store`.

A collective waits for a dead rank for half an hour, and longer work than that may be nothing wrong.
So threads beat while a rank works, however long a download or a batch takes it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from typing import NoReturn

import torch.distributed as dist

from dit_ds import distributed

_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 180


class Heartbeat:
    """In its `with` block, a process ends when another rank has been silent for three minutes.

    All ranks enter it; to make one is a collective. Rank 0, where the store is, hears all the
    others, and they hear rank 0.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store, self._left, self._rank = store, threading.Event(), distributed.rank()
        self._hosts = distributed.gather_json(socket.gethostname())
        others = range(1, len(self._hosts)) if self._rank == 0 else [0]
        # Counted, as the clock also goes on while a process is suspended.
        self._seconds_silent = dict.fromkeys(others, 0)

    def __enter__(self) -> Heartbeat:
        for work in (self._beat, self._listen) if self._seconds_silent else ():
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _beat(self) -> None:
        heard: dict[int, int] = {}
        with contextlib.suppress(dist.DistError):  # without its store, rank 0 is silent
            while not self._left.wait(_BEAT_SECONDS):
                self._store.add(f"beats of {self._rank}", 1)
                for rank in self._seconds_silent:
                    beats = self._store.add(f"beats of {rank}", 0)
                    if beats != heard.get(rank):
                        heard[rank], self._seconds_silent[rank] = beats, 0

    def _listen(self) -> None:  # apart, as calls of a store whose host is gone may not return
        while not self._left.wait(1.0):
            for rank in self._seconds_silent:
                self._seconds_silent[rank] += 1
                if self._seconds_silent[rank] > _SILENT_SECONDS:
                    self.end_without(rank, f"has been silent for {_SILENT_SECONDS} seconds")

    def end_without(self, rank: int, what: str) -> NoReturn:
        """End this process with 2 and a sentence, and no collective: it would wait for `rank`."""
        print(
            f"error: rank {rank} on {self._hosts[rank]} {what}; see what ended it there, and start "
            "again: what is finished is kept",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)
