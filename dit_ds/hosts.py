"""Which machines, and which devices of each: the hostfile, what is chosen of it, and Slurm.

DeepSpeed's launcher trains on this machine alone, in silence, where the hostfile does not exist or
names one other machine; here neither happens. Standard library only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_LINE = "`HOST slots=NUMBER_OF_GPUS`"


@dataclasses.dataclass(frozen=True)
class Host:
    """A machine, as ssh knows it, and the numbers of its devices; a rank runs on each."""

    name: str
    slots: tuple[int, ...]

    @property
    def here(self) -> bool:
        """Whether it is this machine."""
        if self.name in ("localhost", socket.gethostname(), socket.gethostname().split(".")[0]):
            return True
        try:
            found = socket.getaddrinfo(self.name, 0, type=socket.SOCK_STREAM)
        except OSError:
            return False
        return any(_is_own(family, address) for family, _, _, _, address in found)


def _is_own(family: int, address: tuple[object, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as s:
        try:
            s.bind(address)  # only a host's own addresses can be bound
        except OSError:
            return False
    return True


def read(path: Path) -> list[Host]:
    """The machines of a hostfile, in its order.

    Raises:
        ValueError: it does not exist, names no machine or one twice, or a line is none.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not a text file"
        raise ValueError(
            f"--hostfile {path} cannot be read ({reason}); write it with a line {_LINE} for each "
            "machine (launch/hosts is an example), or leave the option out for this machine"
        ) from e
    found: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*(0|[1-9]\d{0,3})", line)
        if not match or match[1].startswith("-"):
            raise ValueError(f"--hostfile {path}, line {number}: {line!r} is not {_LINE}")
        if int(match[2]) == 0:
            raise ValueError(
                f"--hostfile {path}, line {number}: {match[1]} has slots=0; write how many ranks "
                "it shall have, or take the line out (--exclude leaves a machine out for once)"
            )
        if match[1] in found:
            raise ValueError(
                f"--hostfile {path}, line {number}: {match[1]} stands there twice; give all its "
                "slots on one line"
            )
        found[match[1]] = Host(match[1], tuple(range(int(match[2]))))
    if not found:
        raise ValueError(
            f"--hostfile {path} names no machine; write a line {_LINE} for each, or leave the "
            "option out for this machine"
        )
    return list(found.values())


def choose(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> list[Host]:
    """Some of the devices: `--include` or `--exclude`, as `HOST[:SLOT,SLOT...][@HOST...]`.

    Raises:
        ValueError: both, a machine or device that is not there, or none left.
    """
    if include and exclude:
        raise ValueError(f"--include {include} and --exclude {exclude}: give one of the two")
    option, text = ("--include", include) if include else ("--exclude", exclude)
    named: dict[str, tuple[int, ...] | None] = {}
    known = {host.name: host for host in hosts}
    for part in filter(None, text.split("@")):
        name, colon, numbers = part.partition(":")
        if name not in known:
            raise ValueError(
                f"{option} {text}: {name} is not among the machines {', '.join(known)}"
            )
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise ValueError(f"{option} {text}: {part} is not HOST:SLOT,SLOT such as node1:0,2")
        slots = tuple(sorted({int(n) for n in numbers.split(",")})) if colon else None
        if wrong := [n for n in slots or () if n not in known[name].slots]:
            raise ValueError(
                f"{option} {text}: {name} has no slot {wrong[0]}, only "
                f"{', '.join(map(str, known[name].slots))}"
            )
        named[name] = slots
    if include:
        found = [Host(h.name, named[h.name] or h.slots) for h in hosts if h.name in named]
    else:
        found = [
            Host(h.name, tuple(n for n in h.slots if n not in (named[h.name] or h.slots)))
            if h.name in named
            else h
            for h in hosts
        ]
    found = [host for host in found if host.slots]
    if not found:
        raise ValueError(f"{option} {text} leaves no device")
    return found


def first(hosts: Sequence[Host], *, nodes: int | None, slots: int | None) -> list[Host]:
    """The first `nodes` machines, and `slots` devices of each.

    Raises:
        ValueError: there are not as many.
    """
    if nodes is not None:
        if not 1 <= nodes <= len(hosts):
            raise ValueError(
                f"--num_nodes {nodes}: there are {len(hosts)} machines; choose 1 to {len(hosts)}, "
                "or leave the option out for all"
            )
        hosts = hosts[:nodes]
    if slots is None:
        return list(hosts)
    for host in hosts:
        if not 1 <= slots <= len(host.slots):
            raise ValueError(
                f"--num_gpus {slots}: {host.name} has {len(host.slots)} slots; choose 1 to "
                f"{len(host.slots)}, or leave the option out for all"
            )
    return [Host(host.name, host.slots[:slots]) for host in hosts]


def of_slurm(environment: Mapping[str, str]) -> list[Host]:
    """The machines of the Slurm job that `environment` describes.

    A rank for each GPU of a node; without GPUs, for each of its tasks.

    Raises:
        ValueError: `scontrol` does not tell their names.
    """
    names = slurm_names(environment["SLURM_JOB_NODELIST"])
    if gpus := environment.get("SLURM_GPUS_ON_NODE"):
        counts = [int(gpus)] * len(names)
    else:  # such as 2(x3),1
        text = environment.get("SLURM_TASKS_PER_NODE", "1")
        parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        counts = [int(n) for n, times in parts for _ in range(int(times or 1))]
        counts += counts[-1:] * (len(names) - len(counts))
    return [Host(name, tuple(range(count))) for name, count in zip(names, counts, strict=False)]


def slurm_names(nodes: str) -> list[str]:
    """The machines of a list such as `node[01-03]`.

    Raises:
        ValueError: `scontrol` does not tell them.
    """
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as e:
        raise ValueError(
            f"SLURM's nodes {nodes}: `scontrol show hostnames` failed ({e}); run this inside of a "
            "Slurm job, or give --hostfile"
        ) from e


def of_this_machine(slots: int | None, include: str = "") -> list[Host]:
    """This machine alone, with its GPUs; without any, as many ranks as are asked for, or one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    num_gpus = 0 if visible.strip() == "-1" else _num_gpus()
    if num_gpus and visible.startswith(("GPU-", "MIG-")):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible}: name devices by their numbers, or leave it out and "
            "choose with --include localhost:0,2"
        )
    if num_gpus and re.fullmatch(r"\d+(,\d+)*", visible):
        return [Host("localhost", tuple(int(n) for n in visible.split(",")))]
    chosen = [int(n) + 1 for n in re.findall(r"[:,](\d+)", include)]
    return [Host("localhost", tuple(range(num_gpus or slots or max(chosen, default=1))))]


def _num_gpus() -> int:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
