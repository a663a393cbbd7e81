"""Messages between the supervisor and the agent of a host, over a pair of pipes.

A message is a JSON object on a line. Each side beats by receiving: one whose main loop is stopped,
or that is behind a cut link, is silent for the other. Reading and writing are done in threads, so
neither side ever waits for the other. Standard library only.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from typing import IO, Any

# Not every line is ours: the start-up files of a remote shell may print.
_MARK = b"@dit_ds "
_BEAT_SECONDS = 1.0


class Line:
    """One end of it: `reader` and `writer` are binary files."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self.closed = False
        """The other end is gone."""
        self.silent = 0.0
        """Seconds since the other end was heard, as far as this process was running itself."""
        self._heard: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._waiting = 0  # bytes that the other end has not taken
        self._last_beat = 0.0
        self._last_call = time.monotonic()
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()
        threading.Thread(target=self._write, args=(writer,), daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Give a message on its way; returns at once."""
        line = _MARK + json.dumps(message).encode() + b"\n"
        self._waiting += len(line)
        self._told.put(line)

    @property
    def waiting(self) -> int:
        """Bytes sent that the other end has not taken yet."""
        return self._waiting

    def receive(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """The messages that came in; waits at most `seconds` for the first."""
        messages, anything = [], False
        timeout = seconds
        while True:
            try:
                message = self._heard.get(block=timeout > 0, timeout=timeout or None)
            except queue.Empty:
                break
            timeout, anything = 0, True
            if message is None:
                self.closed = True
            elif "beat" not in message:
                messages.append(message)
        now = time.monotonic()
        # A process that was suspended has not listened meanwhile.
        self.silent = 0.0 if anything else self.silent + min(now - self._last_call, 1.0)
        self._last_call = now
        if now - self._last_beat >= _BEAT_SECONDS:
            self._last_beat = now
            self.send({"beat": True})
        return messages

    def _read(self, reader: IO[bytes]) -> None:
        try:
            for line in reader:
                _, mark, message = line.partition(_MARK)  # behind what they left without an end
                if mark:
                    self._heard.put(json.loads(message))
        except (OSError, ValueError):
            pass
        self._heard.put(None)

    def _write(self, writer: IO[bytes]) -> None:
        try:
            while True:
                line = self._told.get()
                writer.write(line)
                writer.flush()
                self._waiting -= len(line)
        except (OSError, ValueError):
            pass  # the reading side notices too
