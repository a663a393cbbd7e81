"""Agents on all hosts: what they are asked, and a job whose ranks start and end as one.

An agent is reached over ssh, under Slurm over `srun`, and on this machine as a child. All talk goes
through its stdin and stdout, so settings arrive as they were written (no shell reads them), no port
is open to others, and whoever is gone is missed.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dit_ds import diagnosis
from dit_ds.console import show
from dit_ds.diagnosis import Event
from dit_ds.hosts import Host
from dit_ds.link import Link, passed

_GRACE_SECONDS = 2.5  # for others' news of the same failure, and their last words
_END_SECONDS = 27.0
_SILENT_SECONDS = 5.0  # of an agent that beats each second


@dataclasses.dataclass
class Asked:
    """What signals have asked of us so far."""

    save: bool = False
    """Save, and go on."""
    stop: bool = False
    """Save, and end."""
    now: bool = False
    """End at once."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What all ranks run."""

    command: Sequence[str]
    """What follows the interpreter: `-m MODULE` or a script, and its arguments."""
    logs: Path
    """Folder, the same on all hosts, of a file `rank-NNNNN.log` for each rank."""
    limits: dict[str, float] | None = None
    """Seconds without progress that each phase of `beats` may take; None: ranks do not beat."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    master_address: str = ""
    """Where rank 0 is met; by default, the address that leads to the other hosts."""
    master_port: int = 0
    first_rank: int = 0
    world_size: int | None = None
    """More ranks than ours, where other machines are started by hand."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended: all ranks with 0, or the one cause."""

    code: int
    why: str = ""
    cause: Event | None = None
    step: int = 0
    """The step at which the cause was seen."""


class Fleet:
    """Agents on hosts; a context manager, which ends them and all they started.

    hosts: those that are there, in their order. unreachable: why the others are not, by name.
    `ask` as often as you like, `run` one job, and `end`.
    """

    def __init__(self, hosts: Sequence[Host], *, slurm: bool = False, seconds: float = 60) -> None:
        self.unreachable: dict[str, str] = {}
        self._links = [Link(host, slurm=slurm) for host in hosts]
        self._answers: dict[int, dict[str, Any]] = {}
        self._questions = 0
        deadline = time.monotonic() + seconds
        while not all(link.agent or link.line.closed for link in self._links):
            for link in self._links:
                self._events(link)
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for link in self._links:
            if not link.agent:
                self.unreachable[link.host.name] = link.why()
                link.end()
        self._links = [link for link in self._links if link.agent]
        self.hosts = [link.host for link in self._links]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def world_size(self) -> int:
        """Ranks on all hosts."""
        return sum(len(host.slots) for host in self.hosts)

    def limit(self, seconds: float) -> None:
        """How long an agent goes on without hearing from here."""
        for link in self._links:
            link.line.send({"limit": seconds})

    def leave(self, name: str) -> None:
        """Go on without a host."""
        for link in self._links:
            if link.host.name == name:
                link.end()
        self._links = [link for link in self._links if link.host.name != name]
        self.hosts = [link.host for link in self._links]

    def ask(
        self,
        function: str,
        *,
        of: Iterable[str] | None = None,
        seconds: float = 20.0,
        **arguments: Any,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What `agent.ANSWERS[function](**arguments)` gives on each host: (values, errors).

        `of`: only on these.
        """
        wanted = {host.name for host in self.hosts} if of is None else set(of)
        asked: dict[int, Link] = {}
        for link in self._links:
            if link.host.name in wanted:
                self._questions += 1
                asked[self._questions] = link
                question = {"ask": function, "id": self._questions, "arguments": arguments}
                link.line.send(question)
        deadline = time.monotonic() + seconds
        while any(n not in self._answers and not link.line.closed for n, link in asked.items()):
            for link in self._links:
                self._events(link)
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        values: dict[str, Any] = {}
        errors: dict[str, str] = {}
        for number, link in asked.items():
            answer = self._answers.pop(number, {})
            if "value" in answer:
                values[link.host.name] = answer["value"]
            else:
                silence = f"no answer to `{function}` within {seconds:g} s"
                errors[link.host.name] = answer.get("error", silence)
        return values, errors

    def run(self, job: Job, asked: Asked, *, save_seconds: float = 600.0) -> Outcome:
        """Start the ranks of a job, and watch them until all have ended, or one has failed.

        What is `asked` goes to all ranks as signals. To stop, they have `save_seconds`.
        """
        limits = job.limits or {}
        silence = limits.get("step", 60.0)
        self.limit(silence)  # before the ranks start, which get it too
        events = self._start(job)
        left: list[Event] = []  # with 0
        running = {link.host.name: len(link.host.slots) for link in self._links}
        deadline = float("inf")
        while any(running.values()) and not asked.now and time.monotonic() < deadline:
            for link in self._links:
                for message in self._events(link):
                    if message.get("event") == "ended" and message["code"] == 0:
                        running[link.host.name] -= 1
                        left.append(_event(link, message))
                    elif "event" in message:
                        events.append(_event(link, message))
                lost = link.line.closed or link.line.silent > silence
                lost = lost and running[link.host.name] > 0
                if lost and all(e.host != link.host.name for e in events if e.kind == "lost"):
                    events.append(Event("lost", link.host.name, why=link.why()))
            if events:
                break
            if asked.save:
                asked.save = False
                self._tell({"signal": signal.SIGUSR1})
            if asked.stop and deadline == float("inf"):
                deadline = time.monotonic() + save_seconds
                self._tell({"signal": signal.SIGTERM})
            time.sleep(0.05)
        if not events and not any(running.values()):
            return Outcome(0)
        if not events and asked.now:
            events.append(Event("stopped", self.hosts[0].name))
        elif not events:
            why = f"the ranks did not save and end within --save-timeout {save_seconds:g}"
            events.append(Event("late", self.hosts[0].name, why=why))
        ranks = self._gather(events)
        if events[0].kind in ("stopped", "late"):
            return Outcome(1, events[0].why or "ended at once, as asked twice")
        cause = diagnosis.first(events, ranks, left)
        step = int(cause.seen["step"]) if cause.seen else max([s["step"] for _, s in ranks] or [0])
        # Later it is not a setting: a shard that cannot be read, perhaps only now.
        at_start = cause.seen.get("phase", "start") == "start"
        code = 2 if cause.kind == "ended" and cause.code == 2 and at_start else 1
        return Outcome(code, diagnosis.sentence(cause, limits), cause, step)

    def _start(self, job: Job) -> list[Event]:
        """Tell every agent its ranks."""
        events: list[Event] = []
        peers = self._meeting(job, events)
        first_rank, world = job.first_rank, job.world_size or self.world_size
        for link in self._links:
            if events:
                break
            count = len(link.host.slots)
            own = {
                "WORLD_SIZE": str(world),
                "LOCAL_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, link.host.slots)),
                **peers[link.host.name],
            }
            terminal = list(os.get_terminal_size()) if sys.stdout.isatty() else None
            link.line.send(
                {
                    "start": {
                        "command": list(job.command),
                        "folder": os.getcwd(),
                        "environment": passed() | own | job.environment,
                        "ranks": list(range(first_rank, first_rank + count)),
                        "logs": str(job.logs.resolve()),
                        "limits": job.limits,
                        "terminal": terminal,
                    }
                }
            )
            first_rank += count
        return events

    def _meeting(self, job: Job, events: list[Event]) -> dict[str, dict[str, str]]:
        """Where the ranks of each host find rank 0, and by which interface they talk."""
        names = [host.name for host in self.hosts]
        ports, errors = self.ask("free_port", of=names[:1])
        found: dict[str, dict[str, str]] = {}
        address = job.master_address
        if not address and len(names) == 1:
            found[names[0]] = {"MASTER_ADDR": "127.0.0.1"}
        elif not address:  # the first host's own name may mean something else there, or here
            ways, errors_ = self.ask("route", of=names[:1], peer=names[1])
            errors |= errors_
            address = ways[names[0]]["address"] if ways else ""
        ways, errors_ = self.ask("route", peer=address) if address else ({}, {})
        for name, way in ways.items():
            found[name] = {"MASTER_ADDR": address}
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                chosen = variable in os.environ or variable in job.environment
                if not chosen and way["interface"] != "lo":  # as of a name that is 127.0.1.1
                    found[name][variable] = way["interface"]
        errors |= errors_
        events += [Event("unable", name, why=error) for name, error in errors.items()]
        port = str(job.master_port or ports.get(names[0], 0))
        return {name: way | {"MASTER_PORT": port} for name, way in found.items()}

    def _gather(self, events: list[Event]) -> list[tuple[str, dict[str, Any]]]:
        """Others' news of a failure, for a moment, and what is seen of each rank."""
        self._tell({"report": True})
        ranks: dict[str, list[dict[str, Any]]] = {}
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            for link in self._links:
                for message in self._events(link):
                    if "ranks" in message:
                        ranks[link.host.name] = message["ranks"]
                    elif "event" in message and message.get("code") != 0:
                        events.append(_event(link, message))
                if link.line.closed or link.line.silent > _SILENT_SECONDS:
                    if all(e.host != link.host.name for e in events if e.kind == "lost"):
                        events.append(Event("lost", link.host.name, why=link.why()))
            time.sleep(0.02)
        return [(name, seen) for name, all_seen in ranks.items() for seen in all_seen]

    def _tell(self, message: dict[str, Any]) -> None:
        for link in self._links:
            link.line.send(message)

    def _events(self, link: Link) -> list[dict[str, Any]]:
        """What an agent says, but for answers, which are kept, and output, which is printed."""
        found = []
        for message in link.line.receive():
            if "hello" in message:
                link.agent = message["hello"]
            elif "answer" in message:
                self._answers[message["answer"]] = message
            elif "output" in message:
                show(message["output"])
            else:
                found.append(message)
        return found

    def end(self) -> list[str]:
        """End all agents and what they started; what could not be killed is described."""
        self._tell({"end": True})
        left: dict[str, list[str]] = {}
        deadline = time.monotonic() + _END_SECONDS
        waiting = list(self._links)
        while waiting and time.monotonic() < deadline:
            for link in list(waiting):
                for message in self._events(link):
                    if "bye" in message:
                        left[link.host.name] = message["bye"]
                if link.host.name in left or link.line.closed or link.line.silent > _SILENT_SECONDS:
                    waiting.remove(link)
            time.sleep(0.02)
        for link in self._links:
            link.end()
        if silent := [link for link in self._links if link.line.silent > _SILENT_SECONDS]:
            # Perhaps only the agent is stopped. Then a new one can end it, with all it started.
            slurm = silent[0].slurm
            with Fleet([link.host for link in silent], slurm=slurm, seconds=12) as again:
                for link in silent:
                    again.ask("end_agent", of=[link.host.name], seconds=2, pid=link.agent)
        self._links, self.hosts = [], []
        return [f"{host}: {what}" for host, all_left in left.items() for what in all_left]


def _event(link: Link, message: dict[str, Any]) -> Event:
    seen = {k: v for k, v in message.items() if k not in ("event", "code", "tail", "why")}
    return Event(
        message["event"],
        link.host.name,
        message.get("rank"),
        message.get("code", 0),
        message.get("why", ""),
        message.get("tail", ""),
        seen,
    )
