"""Faults injected into hosts, each named with its host; and hosts without any pass."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO, make_latents
from tests.multinode.conftest import start, told
from tests.multinode.lab import Lab

pytestmark = pytest.mark.multinode
PACKAGES = Path(sysconfig.get_paths()["purelib"])
BLOCKED = 29555


@pytest.fixture
def hosts(lab: Lab) -> Iterator[Lab]:
    """n1 to n3, which are as before afterwards."""
    yield lab
    for name in lab.names:
        for undo in ("ip link del nic9", "ip rule del pref 9", "tc qdisc del dev eth0 root"):
            subprocess.run(lab.command(name, *undo.split()), capture_output=True)
        lab.lose(name)  # and all that was mounted there
        lab.boot(name)
    for name in lab.names:
        lab.wait_for(name)


def on(lab: Lab, host: str, script: str) -> None:
    subprocess.run(lab.command(host, "bash", "-euc", script), check=True)


def cover(lab: Lab, host: str, path: Path, new: Path) -> None:
    """Another file or folder is seen on that host under `path`."""
    on(lab, host, f"mount --bind {new} {path}")


def edited(path: Path, folder: Path, *, old: str = "", new: str) -> Path:
    """A copy of a file, changed: `old` replaced, or `new` in front."""
    text = path.read_text()
    assert old in text
    copy = folder / f"{len(list(folder.iterdir()))}-{path.name}"
    copy.write_text(text.replace(old, new, 1) if old else new + text)
    return copy


def preflight(
    lab: Lab, tmp_path: Path, *words: str, gpus: bool = False, expect: int = 1
) -> tuple[set[tuple[str, str]], dict[str, Any], str]:
    """(Host, fault) of each, all that is told as JSON, and what is printed before."""
    hostfile = lab.hostfile(tmp_path / "hosts", hosts=lab.names)
    if gpus:
        hostfile.write_text(hostfile.read_text().replace("slots=1", "slots=2"))
    command = ["env", *(["-u", "DS_ACCELERATOR"] if gpus else ["DS_ACCELERATOR=cpu"])]
    command += [sys.executable, str(REPO / "tools" / "preflight.py"), "--hostfile", str(hostfile)]
    command += ["--run", str(tmp_path / "runs" / "r"), "--data", str(tmp_path / "latents")]
    text = told(start(lab, "n1", tmp_path, *command, "--json", *words), expect=expect)
    *shown, last = text.splitlines()
    found = json.loads(last)
    return {(f["host"], f["what"]) for f in found["faults"]}, found, "\n".join(shown)


def named(faults: set[tuple[str, str]], host: str, *words: str) -> None:
    """There is a fault with these words, of that host and no other."""
    hosts = {name for name, what in faults if all(word in what for word in words)}
    assert hosts == {host}, f"{words} of {host}: {sorted(faults)}"


def test_hosts_that_differ_are_named(hosts: Lab, tmp_path: Path) -> None:
    make_latents(tmp_path / "latents")
    run, scratch = tmp_path / "runs" / "r", tmp_path / "scratch"
    run.mkdir(parents=True)
    scratch.mkdir()
    _, found, text = preflight(hosts, tmp_path, "--quick", expect=0)
    assert found["faults"] == [] and "n3 " in text and "eth0 10.77.0.3" in text

    # n2: another torch, another dit_ds, a clock that is ahead, other data.
    metadata = next(PACKAGES.glob("torch-*.dist-info")) / "METADATA"
    torch = edited(metadata, scratch, old="\nVersion: ", new="\nVersion: 9.")
    cover(hosts, "n2", metadata, torch)
    shutil.copytree(REPO / "dit_ds", scratch / "dit_ds")
    (scratch / "dit_ds" / "models.py").write_text("# another\n")
    cover(hosts, "n2", REPO / "dit_ds", scratch / "dit_ds")
    started = next(PACKAGES.glob("*.pth"))  # what is in it, Python runs at its start
    clock = "import time; time.time = lambda ns=time.time_ns: ns() / 1e9 + 300\n"
    cover(hosts, "n2", started, edited(started, scratch, new=clock))
    manifest = tmp_path / "latents" / "manifest.json"
    cover(hosts, "n2", manifest, edited(manifest, scratch, old="tests", new="others"))
    # n2's run directory is its own, and nearly full; n3's can be read only.
    on(hosts, "n2", f"mount -t tmpfs -o size=1m none {run}")
    on(hosts, "n3", f"mount --bind {run} {run} && mount -o remount,bind,ro {run}")
    # n3: another Python, no data, no way to a port, not the interface, a GPU less, another driver.
    python = "import platform; platform.python_version = lambda: '3.99.1'\n"
    cover(hosts, "n3", started, edited(started, scratch, new=python))
    on(hosts, "n3", f"mount -t tmpfs none {tmp_path / 'latents'}")
    on(hosts, "n3", f"ip rule add pref 9 ipproto tcp dport {BLOCKED} prohibit")
    for name, drivers in {"n1": ["550.1"] * 2, "n2": ["550.2"] * 2, "n3": ["535.3"]}.items():
        (scratch / name).mkdir()
        (scratch / name / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(drivers)}")
        (scratch / name / "nvidia-smi").chmod(0o755)
        cover(hosts, name, Path("/usr/local/sbin"), scratch / name)
        if name != "n3":
            on(hosts, name, "ip link add nic9 type veth")
    (tmp_path / "cluster.env").write_text("GLOO_SOCKET_IFNAME=nic9\n")
    words = ["--quick", "--master_port", str(BLOCKED), "--env-file", str(tmp_path / "cluster.env")]
    faults, found, text = preflight(hosts, tmp_path, *words, gpus=True)

    named(faults, "n2", "has torch 9.")
    named(faults, "n2", "has another dit_ds")
    named(faults, "n2", "its clock is 300 s ahead")
    named(faults, "n2", "data.path=", "manifest.json is another")
    named(faults, "n2", "GB of free disk")
    named(faults, "n2", f"{run} is another folder there")
    named(faults, "n3", f"{run} cannot be written")
    named(faults, "n3", "has Python 3.99")
    named(faults, "n3", "data.path=", "cannot be read")
    named(faults, "n3", f"does not reach n1 at 10.77.0.1, port {BLOCKED}")
    named(faults, "n3", "GLOO_SOCKET_IFNAME=nic9")
    named(faults, "n3", "has 1 GPUs, and the slots asked for go up to GPU 1")
    named(faults, "n3", "has the GPU driver 535.3")
    assert len(faults) == 13
    assert "FAULT n2: its clock is 300 s ahead\n    set it" in text
    assert [note["what"] for note in found["notes"] if note["host"] == "n2"] == [
        "has the GPU driver 550.2, the others 550.1"
    ]
    assert not list(run.parent.rglob(".preflight*"))


def test_hosts_that_cannot_be_had_are_named(hosts: Lab, tmp_path: Path) -> None:
    make_latents(tmp_path / "latents")
    on(hosts, "n2", "pkill -x sshd")  # of that host, which has its own processes
    on(hosts, "n3", f"mount --bind /dev/null {hosts._folder}/user_key.pub")
    port = "import socket, time; s = socket.create_server(('', 29556)); print(flush=True); "
    holder = start(hosts, "n1", tmp_path, sys.executable, "-c", port + "time.sleep(99)")
    assert holder.stdout and holder.stdout.readline()
    faults, _, text = preflight(hosts, tmp_path, "--quick", "--master_port", "29556")
    on(hosts, "n1", "pkill -f create_server")
    holder.communicate()
    named(faults, "n2", "Connection refused")
    named(faults, "n3", "Permission denied")
    named(faults, "n1", "port 29556: ", "Address already in use")
    assert len(faults) == 3 and "start sshd there" in text and "without a password" in text

    own = Path("/etc/hosts").read_text()
    (tmp_path / "names").write_text(own + "\n127.0.1.1 n2\n10.77.0.3 n3\n")
    cover(hosts, "n1", Path("/etc/hosts"), tmp_path / "names")
    faults, _, _ = preflight(hosts, tmp_path, "--quick", "--exclude", "n3")
    named(faults, "n2", "is the same machine as n1")


def test_what_only_ranks_find(hosts: Lab, tmp_path: Path) -> None:
    make_latents(tmp_path / "latents")
    for name in hosts.names:  # as Debian and Ubuntu install it
        (tmp_path / name).write_text(
            f"127.0.0.1 localhost\n127.0.1.1 {name}\n"
            + "".join(f"10.77.0.{i + 1} {n}\n" for i, n in enumerate(hosts.names) if n != name)
        )
        cover(hosts, name, Path("/etc/hosts"), tmp_path / name)
    on(hosts, "n3", "tc qdisc add dev eth0 root tbf rate 20mbit burst 64kb latency 100ms")
    faults, found, _ = preflight(hosts, tmp_path)
    named(faults, "n3", "its network is slow: 0.0")
    assert len(faults) == 1 and found["network"]["ranks"] == 3

    # On n2, torch adds wrongly.
    collectives = PACKAGES / "torch" / "distributed" / "distributed_c10d.py"
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        collectives.read_text()
        + "\n_right = all_reduce\n\n\ndef all_reduce(tensor, *rest, **more):\n"
        "    work = _right(tensor, *rest, **more)\n    if tensor.numel() > 1000:\n"
        "        tensor[7] += 1\n    return work\n"
    )
    cover(hosts, "n2", collectives, wrong)
    faults, _, text = preflight(hosts, tmp_path)
    named(faults, "n2", "rank 1 got wrong sums in an all-reduce")
    assert len(faults) == 1 and "leave it out (--exclude)" in text
