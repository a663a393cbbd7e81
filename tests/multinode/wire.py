"""A slow cable: carries frames between two interfaces at a bandwidth and with a delay, each way.

    python -m tests.multinode.wire INTERFACE INTERFACE MBIT MS

It is what the kernel's netem does, which not every kernel has. Needs root.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from collections import deque

_SOL_PACKET, _VNET_HDR, _IGNORE_OUTGOING, _ALL_PROTOCOLS = 263, 15, 23, 3
_LARGEST = 1 << 17  # a frame of many segments, and its header
_MOST_WAITING_SECONDS = 0.1  # what a switch would hold; the rest is lost, and TCP slows down


def end(interface: str) -> socket.socket:
    """All frames of an interface, with the header that keeps large ones whole."""
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    s.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
    s.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    s.bind((interface, 0))
    return s


def carry(ends: list[socket.socket], *, bytes_per_second: float, delay_seconds: float) -> None:
    """Carry frames both ways, for ever."""
    under_way: list[deque[tuple[float, bytes]]] = [deque(), deque()]
    free_at = [0.0, 0.0]  # when the last bit of what came before is on the cable
    while True:
        now = time.monotonic()
        for frames, target in zip(under_way, reversed(ends), strict=True):
            while frames and frames[0][0] <= now:
                with contextlib.suppress(OSError):  # unplugged: lost, as on a cable
                    target.send(frames.popleft()[1])
        wait = min((frames[0][0] for frames in under_way if frames), default=now + 1) - now
        for source in select.select(ends, [], [], max(wait, 0))[0]:
            way = ends.index(source)
            try:
                frame = source.recv(_LARGEST)
            except OSError:
                continue
            now = time.monotonic()
            if free_at[way] - now < _MOST_WAITING_SECONDS:
                free_at[way] = max(free_at[way], now) + len(frame) / bytes_per_second
                under_way[way].append((free_at[way] + delay_seconds, frame))


def main() -> None:
    """Be the cable that the command line describes."""
    *interfaces, mbit, ms = sys.argv[1:]
    ends = [end(name) for name in interfaces]
    print("plugged in", flush=True)
    carry(ends, bytes_per_second=float(mbit) * 1e6 / 8, delay_seconds=float(ms) / 1000)


if __name__ == "__main__":
    main()
