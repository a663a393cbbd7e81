"""From what hosts answer to what is wrong with them; pure functions for `dit_ds.preflight`.

A host is at fault where it differs from most others (from the first, among equals). Of Python only
the first two numbers must agree, of the GPU driver only the first; the rest is worth a note.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

CLOCK_SECONDS = 5.0
"""Clocks may be so far apart; beyond, logs and file times of the hosts cannot be read together."""

Answers = Mapping[str, Mapping[str, Any]]
"""By host, what `dit_ds.facts` answered."""

_INSTALL = "install the same versions there: pip install -c constraints.txt -e ."


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a host, and what to do."""

    host: str
    what: str
    remedy: str


def faults(facts: Answers, slots: Mapping[str, Sequence[int]]) -> list[Fault]:
    """In answers to `facts`: machines named twice, versions, code, devices against slots."""
    found = [
        Fault(name, f"is the same machine as {other}", "take one of the two out of the hostfile")
        for name, other in _twice(facts).items()
    ]
    versions = {"Python": {name: _part(a["python"], 2) for name, a in facts.items()}}
    for package in next(iter(facts.values()))["packages"] if facts else ():
        versions[package] = {name: a["packages"][package] for name, a in facts.items()}
    for what, by_host in versions.items():
        for name, mine, usual in _odd(by_host):
            told = f"has {what} {mine or 'not at all'}, the others {usual or 'not at all'}"
            found.append(Fault(name, told, _INSTALL))
    return [*found, *_code(facts), *_devices(facts, slots)]


def notes(facts: Answers) -> list[Fault]:
    """Differences that need not hurt, and what may not be meant."""
    found = []
    for what, told, branch in (("Python", "python", 2), ("the GPU driver", "driver", 1)):
        usual_branch = _usual([_part(a[told], branch) for a in facts.values()])
        versions = {name: a[told] for name, a in facts.items()}
        alike = {n: v for n, v in versions.items() if _part(v, branch) == usual_branch}
        for name, mine, usual in _odd(alike):
            found.append(Fault(name, f"has {what} {mine}, the others {usual}", "it should work"))
    return found


def no_gpus(facts: Answers) -> list[Fault]:
    """A note, where GPUs were looked for on all hosts and there is none."""
    if any(a["num_gpus"] or a["gpu_error"] for a in facts.values()):
        return []
    remedy = "set DS_ACCELERATOR=cpu if that is meant"
    return [Fault(name, "has no GPU: ranks compute on its CPU", remedy) for name in facts]


def _code(facts: Answers) -> list[Fault]:
    found = []
    remedy = "bring it to the same commit, without changes of its own (git status)"
    for name, _, code in _odd({name: a["code"] for name, a in facts.items()}):
        usual = next(a for a in facts.values() if a["code"] == code)
        mine, theirs = (a["commit"] or f"code {a['code'][:12]}" for a in (facts[name], usual))
        if mine == theirs:
            mine = f"other changes to {mine}"
        found.append(Fault(name, f"has another dit_ds: {mine}, the others {theirs}", remedy))
    others = facts.keys() - {fault.host for fault in found}
    commits = {name: a["commit"] for name, a in facts.items() if name in others and a["commit"]}
    for name, mine, usual in _odd(commits):
        found.append(Fault(name, f"is at commit {mine}, the others at {usual}", remedy))
    return found


def _devices(facts: Answers, slots: Mapping[str, Sequence[int]]) -> list[Fault]:
    found = []
    some = any(a["num_gpus"] for a in facts.values())
    for name, a in facts.items():
        wanted, there = max(slots[name], default=-1) + 1, a["num_gpus"]
        if a["gpu_error"]:
            remedy = "mend the driver there (often: reboot), until nvidia-smi works"
            found.append(Fault(name, f"nvidia-smi fails: {a['gpu_error']}", remedy))
        elif some and wanted > there:
            what = f"has {there} GPUs, and the slots asked for go up to GPU {wanted - 1}"
            remedy = f"write slots={there} into the hostfile, or see why nvidia-smi shows no more"
            remedy = remedy if there else "take it out of the hostfile, or install the driver"
            found.append(Fault(name, what, remedy))
    drivers = {name: _part(a["driver"], 1) for name, a in facts.items() if a["driver"]}
    for name, _, usual in _odd(drivers):
        what = f"has the GPU driver {facts[name]['driver']}, the others {usual}"
        found.append(Fault(name, what, "install the same driver there"))
    return found


def clocks(seconds: Mapping[str, float]) -> list[Fault]:
    """`seconds`: by host, how far its clock is ahead of ours."""
    usual = statistics.median_low(seconds.values()) if seconds else 0.0
    remedy = "set it (date), and keep it by chrony or systemd-timesyncd"
    return [
        Fault(
            name,
            f"its clock is {abs(ahead - usual):.0f} s {'ahead' if ahead > usual else 'behind'}",
            remedy,
        )
        for name, ahead in seconds.items()
        if abs(ahead - usual) > CLOCK_SECONDS
    ]


def interfaces(facts: Answers, environment: Mapping[str, str]) -> list[Fault]:
    """Hosts that lack the network interface that the environment chooses."""
    found = []
    for setting in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(setting, "")
        if not wanted or wanted.startswith("^"):
            continue
        names = wanted.lstrip("=").split(",")
        for host, a in facts.items():
            # NCCL takes any of the names, or of what begins with them; gloo wants them all.
            there = [name for name in names if name in a["interfaces"]]
            if setting.startswith("NCCL") and not wanted.startswith("="):
                there += [n for n in names if any(i.startswith(n) for i in a["interfaces"])]
            if (len(there) < len(names)) if setting.startswith("GLOO") else not there:
                what = f"{setting}={wanted}: it has only {', '.join(a['interfaces'])}"
                remedy = f"correct {setting}, or leave it out: the way to the others is found"
                found.append(Fault(host, what, remedy))
    return found


def storage(
    stored: Answers, run: str, data: Mapping[str, str], *, disk_bytes: float
) -> list[Fault]:
    """In answers to `storage`; `data`: the folder of each setting."""
    found = []
    for name, a in stored.items():
        if a["mark_error"]:
            what = f"{a['folder']} cannot be written ({a['mark_error']})"
            remedy = "mount it writable, correct its permissions, or choose another --run"
            found.append(Fault(name, what, remedy))
        if run and a["free_bytes"] < disk_bytes:
            what = f"{a['folder']} has {a['free_bytes'] / 1e9:.1f} GB of free disk"
            remedy = f"make room for {disk_bytes / 1e9:g} GB, or choose another --run"
            found.append(Fault(name, what, remedy))
    for setting, path in data.items():
        for name, a in stored.items():
            if error := a["data"][path]["error"]:
                what = f"{setting}={path}: manifest.json cannot be read ({error})"
                remedy = "make it visible there under the same path, or correct the path"
                found.append(Fault(name, what, remedy))
        hashes = {name: a["data"][path]["sha256"] for name, a in stored.items()}
        for name, *_ in _odd({name: sha for name, sha in hashes.items() if sha}):
            what = f"{setting}={path}: manifest.json is another than the others'"
            found.append(Fault(name, what, "copy the data set there again, whole"))
    return found


def not_shared(marks: Mapping[str, str], seen: Mapping[str, list[str]], run: str) -> list[Fault]:
    """Hosts that do not see, or whose own is not seen, where `run` is.

    `marks`: by host, the name of the file that it wrote; `seen`: those of all that it sees.
    """
    counts = Counter(name for names in seen.values() for name in names)
    reference = max(marks, key=lambda host: counts[marks[host]])
    remedy = "put runs on storage that all hosts share, mounted at the same path"
    found = []
    for name, names in seen.items():
        if marks[reference] not in names:
            what = f"{run} is another folder there: a file that {reference} renamed is not seen"
            found.append(Fault(name, what, remedy))
        elif reference in seen and marks[name] not in seen[reference]:
            what = f"{run} is another folder there: {reference} does not see a file renamed there"
            found.append(Fault(name, what, remedy))
    return found


def network(found: Mapping[str, Any], names: Mapping[str, str]) -> list[Fault]:
    """In what `dit_ds.network` measured; `names`: the host of each host name."""

    def host(told: str) -> str:
        own = re.sub(r" \(rank \d+\)$", "", told)
        return names.get(own, own)

    faults = []
    for rank in found["wrong_sums"]:
        number, _, name = rank.partition(" on ")
        what = f"{number} got wrong sums in an all-reduce"
        remedy = "leave it out (--exclude), and test its memory, its GPUs and its network card"
        faults.append(Fault(host(name), what, remedy))
    if faults:
        return faults
    rates = {tuple(link["hosts"]): link["bytes_per_second"] for link in found["links"]}
    usual = statistics.median(rates.values()) if rates else 0.0
    for name in found["slow_hosts"]:
        best = max(rate for pair, rate in rates.items() if name in pair)
        what = f"its network is slow: {_gigabits(best)} at best, {_gigabits(usual)} are usual"
        remedy = "look at its cable, its port at the switch and its interface (ethtool, ip -s link)"
        faults.append(Fault(host(name), what, remedy))
    for a, b in found["slow_links"]:
        what = (
            f"the link to {host(b)} is slow: {_gigabits(rates[a, b])}, {_gigabits(usual)} are usual"
        )
        faults.append(Fault(host(a), what, "look at the switches between the two"))
    return faults


def _gigabits(bytes_per_second: float) -> str:
    return f"{8e-9 * bytes_per_second:.3g} Gbit/s"


def _odd(values: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Hosts whose value is not the usual one: (host, its value, the usual one)."""
    usual = _usual(list(values.values()))
    return [(name, mine, usual) for name, mine in values.items() if mine != usual]


def _usual(values: Sequence[Any]) -> Any:
    """The most frequent one; the first, among equals."""
    return Counter(values).most_common(1)[0][0] if values else None


def _part(version: str | None, numbers: int) -> str | None:
    """The first numbers of a version."""
    return None if version is None else ".".join(version.split(".")[:numbers])


def _twice(facts: Answers) -> dict[str, str]:
    """Hosts that are the same machine as one before."""
    first: dict[tuple[str, str], str] = {}
    found = {}
    for name, a in facts.items():
        other = first.setdefault((a["hostname"], a["boot"]), name)
        if other != name:
            found[name] = other
    return found
