"""Which rank failed first, and why, out of what the agents saw. Standard library only.

When one rank is gone the others fail within milliseconds, in collectives; when one hangs, all hang.
So the order in which news arrive says little, and their kind more.
"""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Sequence
from typing import Any

# What ranks say whose peer is gone: consequences, not causes.
_CONSEQUENCE = re.compile(
    r"Connection (reset|closed|refused)|closed by peer|Broken pipe|Timed out waiting|"
    r"DistNetworkError|DistBackendError|remote process exited|Socket closed"
)
_CRASHES = (signal.SIGSEGV, signal.SIGBUS)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that ends an attempt, in order of arrival."""

    kind: str
    """`ended`, `stalled`, `lost` (a host), or `unable` (to start)."""
    host: str
    rank: int | None = None
    code: int = 0
    why: str = ""
    tail: str = ""
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What its agent saw of the rank last: phase, step, doing, quiet, state, number (of beats)."""


def first(
    events: Sequence[Event],
    ranks: Sequence[tuple[str, dict[str, Any]]],
    left: Sequence[Event] = (),
) -> Event:
    """The cause among the events.

    ranks: what was seen last of each rank, with its host. left: ranks that had ended with 0 before.
    """
    ended = [e for e in events if e.kind == "ended"]
    killed = [e for e in ended if e.code < 0 and -e.code not in (signal.SIGTERM, signal.SIGABRT)]
    own = [e for e in ended if e.code > 0 and not _CONSEQUENCE.search(e.tail)]
    if own:  # a process may also crash as it ends for another's error
        before = ended[: ended.index(own[0])]
        killed = [e for e in killed if -e.code not in _CRASHES or e in before]
    # All that failed missed another: one that left in peace.
    missed = ended and not own and all(e.code > 0 for e in ended)
    for kind in (
        killed,
        [e for e in events if e.kind in ("lost", "unable")],
        own,
        left if missed else [],
        ended,
    ):
        if kind:
            return kind[0]
    # All hang, as they wait for one. It is stopped, or waits for a disk, or is the furthest behind.
    hosts = {seen["rank"]: host for host, seen in ranks}
    seen = min(
        [e.seen for e in events] + [seen for _, seen in ranks if seen["state"]],
        key=lambda s: ("TtD".find(s["state"] or "?") < 0, s["number"]),
    )
    return Event("stalled", hosts.get(seen["rank"], events[0].host), seen["rank"], seen=seen)


def sentence(event: Event, limits: dict[str, float]) -> str:
    """What happened, for people."""
    where = event.host if event.rank is None else f"rank {event.rank} on {event.host}"
    seen = event.seen
    at = ""
    if seen:
        doing = f" ({seen['doing']})" if seen["doing"] else ""
        at = f" in phase {seen['phase']} at step {seen['step']}{doing}"
    if event.kind == "lost":
        return f"{where} was lost: {event.why}"
    if event.kind == "unable":
        return f"{where} could not start its ranks: {event.why}"
    if event.kind == "ended":
        if event.code < 0:
            name = signal.Signals(-event.code).name if -event.code < 65 else str(-event.code)
            return f"{where} was killed by {name}{at}{f'; {event.why}' if event.why else ''}"
        if event.code == 0:
            return f"{where} ended with exit code 0 before the others{at}"
        last = next((line for line in reversed(event.tail.splitlines()) if line.strip()), "")
        return f"{where} ended with exit code {event.code}{at}{f': {last.strip()}' if last else ''}"
    phase = seen["phase"]
    state = {
        "T": "; it is stopped (SIGSTOP, or a debugger)",
        "t": "; a debugger holds it",
        "D": "; it sleeps uninterruptibly, as when storage does not answer",
    }.get(seen["state"], "")
    limit = f"the limit of this phase is --{phase}-timeout {limits[phase]:g}"
    return f"{where} has not moved for {seen['quiet']:.0f} s{at}{state}; {limit}"
