"""Before ranks start: are all hosts there, alike, and able to work together?

`look` asks all hosts at once and compares what they answer, which takes about a second. `measure`
then lets ranks find out what only they can: right sums, and the bandwidth of each link. `python
tools/preflight.py` does both; the supervisor looks before each start. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_ds import comparison, files
from dit_ds.comparison import Fault
from dit_ds.fleet import Asked, Fleet, Job
from dit_ds.hosts import Host

DISK_GB = 1.0
"""Free disk (10^9 bytes) without which nothing starts. Checkpoints of large models need more."""
_SHARED_SECONDS = 10.0  # in which a file that one host renamed shows on the others
_MEASURE_SECONDS = 300.0  # that ranks may be at one thing: their start, a round of pairs
_COLUMNS = (
    *("host", "ranks", "python", "torch", "code", "GPUs", "driver", "cores", "memory", "disk"),
    *("clock", "interface"),
)
# Remedies where a host does not answer a question.
_ASKED = {
    "storage": "look at the mounts of the run and the data there: they may hang",
    "marks": "look at the mount of the run there: it may hang",
    "listen": "end the program that has the port (ss -ltnp), or give another --master_port",
    "route": "name every host in DNS, or in /etc/hosts of all hosts, by its network address",
    "reach": "let the firewalls pass all TCP ports between the hosts",
}


@dataclasses.dataclass
class Report:
    """What was found: `faults`, for which nothing should start, and `notes`."""

    hosts: list[Host]
    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By host, what it answered, with `ahead_seconds` of its clock, `interface` and `address`."""
    faults: list[Fault] = dataclasses.field(default_factory=list)
    notes: list[Fault] = dataclasses.field(default_factory=list)
    network: dict[str, Any] | None = None
    """What `dit_ds.network` measured."""

    def table(self) -> str:
        """A line for each host; then one for each fault, with its remedy."""
        rows = [_COLUMNS, *(_row(host, self.facts.get(host.name)) for host in self.hosts)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)
        told = files.printable(table) + lines("FAULT", self.faults) + lines("note", self.notes)
        return told.rstrip("\n")

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        about = {host.name: dataclasses.asdict(host) for host in self.hosts}
        return {
            "hosts": [about[name] | self.facts.get(name, {}) for name in about],
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
            "notes": [dataclasses.asdict(note) for note in self.notes],
            "network": self.network,
        }


def lines(kind: str, found: Sequence[Fault]) -> str:
    """Two lines for each fault or note: hosts and what, remedy."""
    hosts: dict[tuple[str, str], list[str]] = {}
    for fault in found:
        hosts.setdefault((fault.what, fault.remedy), []).append(fault.host)
    told = (
        f"{kind} {', '.join(names)}: {what}\n    {remedy}\n"
        for (what, remedy), names in hosts.items()
    )
    return files.printable("".join(told))


def look(
    fleet: Fleet,
    *,
    run: Path | None = None,
    data: str = "",
    validation: str = "",
    environment: Mapping[str, str] | None = None,
    master_port: int = 0,
    disk_gb: float = DISK_GB,
) -> Report:
    """Ask all hosts, and compare.

    `run` need not exist. `data` and `validation` may be empty, or URLs, at which nothing is looked.
    `environment`: what the ranks get beside ours. A `master_port` of 0 tries any.
    """
    variables = {**os.environ, **(environment or {})}
    report = Report([*fleet.hosts, *(Host(name, ()) for name in fleet.unreachable)])
    for name, why in fleet.unreachable.items():
        what, _, remedy = why.partition("; ")
        remedy = remedy or f"see why `ssh {name} true` does not work without a question"
        report.faults.append(Fault(name, what, remedy))
    hosts = _Hosts(fleet, report)
    token = secrets.token_hex(8)
    try:
        _look_at_machines(hosts, variables)
        _look_at_storage(
            hosts, token, run, {"data.path": data, "validation.path": validation}, disk_gb
        )
        _look_at_ways(hosts, token, master_port)
    finally:
        fleet.ask("forget", seconds=5, token=token)
    return report


class _Hosts:
    """Those that can answer; one that cannot is at fault, and asked no more."""

    def __init__(self, fleet: Fleet, report: Report) -> None:
        self.fleet, self.report = fleet, report
        self.names = [host.name for host in fleet.hosts]

    def ask(
        self, what: str, of: Iterable[str] | None = None, trying: str = "", **arguments: Any
    ) -> dict[str, Any]:
        """Answers by host; `trying` begins the sentence where there is none."""
        asked = self.names if of is None else [name for name in of if name in self.names]
        values, errors = self.fleet.ask(what, of=asked, **arguments)
        for name, error in errors.items():
            remedy = _ASKED.get(what, "see what is wrong with that host")
            self.report.faults.append(Fault(name, trying + error.strip(), remedy))
        self.names = [name for name in self.names if name not in errors]
        return {name: values[name] for name in asked if name in values}


def _look_at_machines(hosts: _Hosts, variables: Mapping[str, str]) -> None:
    report, gpus = hosts.report, variables.get("DS_ACCELERATOR") != "cpu"
    began = time.time()
    clocks = hosts.ask("clock")
    ahead = {name: clock - (began + time.time()) / 2 for name, clock in clocks.items()}
    report.facts = hosts.ask("facts", gpus=gpus)
    for name, facts in report.facts.items():
        facts["ahead_seconds"] = ahead[name]
    slots = {host.name: host.slots for host in report.hosts}
    report.faults += comparison.faults(report.facts, slots)
    report.faults += comparison.clocks(ahead)
    report.faults += comparison.interfaces(report.facts, variables)
    report.notes += comparison.notes(report.facts)
    report.notes += comparison.no_gpus(report.facts) if gpus else []


def _look_at_storage(
    hosts: _Hosts, token: str, run: Path | None, data: Mapping[str, str], disk_gb: float
) -> None:
    folder = os.path.abspath(run) if run else ""
    folders = {
        setting: os.path.abspath(path)
        for setting, path in data.items()
        if path and "://" not in path
    }
    stored = hosts.ask("storage", run=folder, data=list(folders.values()), token=token)
    for name, answer in stored.items():
        hosts.report.facts[name] |= answer
    found = comparison.storage(stored, folder, folders, disk_bytes=disk_gb * 1e9)
    marks = {name: answer["mark"] for name, answer in stored.items() if answer["mark"]}
    if len(marks) > 1:
        names = sorted(marks.values())
        seen = hosts.ask("marks", of=marks, names=names, patience=_SHARED_SECONDS, token=token)
        found += comparison.not_shared(marks, seen, folder)
    hosts.report.faults += found


def _look_at_ways(hosts: _Hosts, token: str, master_port: int) -> None:
    """The port of the first host, and the way there from the others, as `Fleet.run` chooses it."""
    if not hosts.names:
        return
    first, *others = hosts.names
    trying = f"port {master_port}: " if master_port else ""
    ports = hosts.ask("listen", of=[first], trying=trying, port=master_port, token=token)
    if not others or not ports:
        return
    ways = hosts.ask("route", of=[first], peer=others[0])
    if not ways:
        return
    address = ways[first]["address"]
    if ways[first]["interface"] == "lo":
        what = f"takes {others[0]} for itself: the name leads to {address} there"
        hosts.report.faults.append(Fault(first, what, _ASKED["route"]))
        return
    ways |= hosts.ask("route", of=others, peer=address)
    for name, way in ways.items():
        hosts.report.facts[name] |= way
    where = f"does not reach {first} at {address}, port {ports[first]}: "
    hosts.ask("reach", of=others, trying=where, address=address, port=ports[first], token=token)


def measure(
    fleet: Fleet,
    report: Report,
    logs: Path,
    *,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Let a rank on each device measure the network, into the report.

    `logs`: a new folder, the same on all hosts, for what the ranks write.
    """
    hosts, out = list(fleet.hosts), logs.absolute() / "network.json"
    command = ["-m", "dit_ds.network", "--out", str(out)]
    limits = {"start": _MEASURE_SECONDS}
    job = Job(command, logs, limits=limits, environment=dict(environment or {}))
    outcome = fleet.run(job, Asked())
    told, _ = fleet.ask("content", of=[hosts[0].name], path=str(out))  # perhaps only seen there
    if hosts[0].name in told:
        report.network = json.loads(told[hosts[0].name])
        names = {facts["hostname"]: name for name, facts in report.facts.items()}
        report.faults += comparison.network(report.network, names)
    else:
        cause = outcome.cause
        why = outcome.why or f"there is no {out}"
        if cause and cause.kind == "stalled":
            why = f"rank {cause.rank} hangs, {cause.seen['doing'] or 'starting'}"
        host = cause.host if cause else hosts[0].name
        what = f"the network was not measured: {why}"
        report.faults.append(Fault(host, what, f"look at the ranks' logs in {logs}"))


def _row(host: Host, facts: Mapping[str, Any] | None) -> Sequence[str]:
    if facts is None:
        return [host.name, str(len(host.slots) or "?"), *["?"] * (len(_COLUMNS) - 2)]
    return [
        host.name,
        str(len(host.slots)),
        facts["python"],
        facts["packages"]["torch"] or "none",
        facts["commit"] or facts["code"][:12],
        str(facts["num_gpus"]),
        facts["driver"] or "none",
        str(facts["cores"]),
        f"{facts['free_memory_bytes'] / 1e9:.0f} GB",
        f"{facts['free_bytes'] / 1e9:.0f} GB" if "free_bytes" in facts else "-",
        f"{facts['ahead_seconds']:+.1f} s",
        f"{facts['interface']} {facts['address']}" if "interface" in facts else "-",
    ]
