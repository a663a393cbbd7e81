"""Hosts made out of namespaces on one machine, to try real launches over several.

Each has its own address, host name, processes, /dev/shm, /run and sshd, and sees the same files, as
hosts with shared storage do. Needs root, and on Debian or Ubuntu: apt-get install
openssh-server openssh-client pdsh iproute2 procps.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_REPO = Path(__file__).parents[2]
PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh", "sshd")
_HOST = """
hostname {name}
mount -t tmpfs none /dev/shm && mount -t tmpfs none /run && mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts && mount --bind {folder}/ssh_config /etc/ssh/ssh_config
"$(command -v sshd)" -D -e -f {folder}/sshd_config 2>> {folder}/{name}.log &
while :; do wait; sleep 0.2; done
"""


class Lab:
    """`num_hosts` hosts named n1, n2, ... with the addresses 10.77.0.1, 10.77.0.2, ...

    A context manager; nothing outside the namespaces and `folder` is touched.
    """

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.names = [f"n{i + 1}" for i in range(num_hosts)]
        self._folder, self._prefix = folder, f"lab{os.getpid()}"
        self._inits: dict[str, int] = {}  # process id of each host's first process
        self._outer: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Lab:
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        for name in list(self._outer):
            self.lose(name)
        for name in (*self.names, "switch"):
            _run("ip", "netns", "del", self._net(name), check=False)

    def command(self, host: str, *command: str) -> list[str]:
        """What runs a command on a host, in the folder where this is started."""
        enter = ["nsenter", "-t", str(self._inits[host]), "-n", "-p", "-m", "-u", "-i"]
        return [*enter, "-w.", *command]

    def ranks(self, hosts: Sequence[str], *arguments: str) -> list[list[str]]:
        """What runs Python with these arguments as a rank on each host, without a launcher."""
        world = {
            "WORLD_SIZE": len(hosts),
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": 29500,
            "LOCAL_RANK": 0,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": 1,
        }
        shared = [f"{name}={value}" for name, value in world.items()]
        python = [sys.executable, *arguments]
        return [
            self.command(host, "env", *shared, f"RANK={rank}", *python)
            for rank, host in enumerate(hosts)
        ]

    def hostfile(self, path: Path, hosts: Sequence[str]) -> Path:
        """A hostfile of some of the hosts, with a rank on each."""
        path.write_text("".join(f"{name} slots=1\n" for name in hosts))
        return path

    @contextlib.contextmanager
    def shape(self, name: str, *, mbit: float, ms: float) -> Iterator[None]:
        """Give a host a cable of so many Mbit/s that delays by `ms`, each way, for a while."""
        switch, cable = self._net("switch"), [f"{name}-a", f"{name}-b"]
        veth = ["type", "veth", "peer", "name", cable[1]]
        _run("ip", "-n", switch, "link", "add", cable[0], *veth)
        for end in cable:
            _run("ip", "-n", switch, "link", "set", end, "up")
        wire = [sys.executable, "-m", "tests.multinode.wire", name, cable[1], str(mbit), str(ms)]
        enter = ["ip", "netns", "exec", switch, *wire]
        with subprocess.Popen(enter, cwd=_REPO, stdout=subprocess.PIPE, text=True) as process:
            try:
                if process.stdout is None or not process.stdout.readline():
                    raise RuntimeError(f"no cable for {name}: {' '.join(enter)}")
                _run("ip", "-n", switch, "link", "set", name, "nomaster")
                _run("ip", "-n", switch, "link", "set", cable[0], "master", "br0")
                yield
            finally:
                process.kill()
                _run("ip", "-n", switch, "link", "del", cable[0])
                _run("ip", "-n", switch, "link", "set", name, "master", "br0")

    def cut(self, name: str) -> None:
        """Unplug a host's cable: nothing arrives and nothing says so."""
        _run("ip", "-n", self._net("switch"), "link", "set", name, "down")

    def join(self, name: str) -> None:
        """Plug it in again."""
        _run("ip", "-n", self._net("switch"), "link", "set", name, "up")

    def lose(self, name: str) -> None:
        """Switch a host off, and with it all its processes; the others hear nothing."""
        if name in self._inits:
            self.cut(name)
        process = self._outer.pop(name)
        process.kill()
        process.wait()

    def is_on(self, name: str) -> bool:
        """Whether it was not switched off."""
        return name in self._outer

    def boot(self, name: str) -> None:
        """Switch a host on."""
        script = _HOST.format(name=name, folder=self._folder)
        enter = ["ip", "netns", "exec", self._net(name), "unshare", "-pmuif", "--kill-child"]
        command = [*enter, "--mount-proc", "bash", "-c", script]
        with open(self._folder / f"{name}.log", "ab") as log:
            files: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._outer[name] = subprocess.Popen(command, **files, start_new_session=True)
        self._inits[name] = _child_of(self._outer[name].pid)
        self.join(name)

    def wait_for(self, name: str) -> None:
        """Until it answers by ssh."""
        _until(lambda: self._answers(name), f"{name} by ssh", self._folder)

    def _net(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _up(self) -> None:
        self._write_configuration()
        switch = self._net("switch")
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            net = self._net(name)
            _run("ip", "netns", "add", net)
            veth = ["type", "veth", "peer", "name", "eth0", "netns", net]
            _run("ip", "-n", switch, "link", "add", name, *veth)
            _run("ip", "-n", switch, "link", "set", name, "master", "br0", "up")
            _run("ip", "-n", net, "link", "set", "lo", "up")
            _run("ip", "-n", net, "link", "set", "eth0", "up")
            _run("ip", "-n", net, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            self.boot(name)
        for name in self.names:
            self.wait_for(name)

    def _answers(self, name: str) -> bool:
        command = self.command(self.names[0], "ssh", name, "true")
        return subprocess.run(command, capture_output=True).returncode == 0

    def _write_configuration(self) -> None:
        folder = self._folder
        folder.mkdir(parents=True)
        for key in ("host_key", "user_key"):
            _run("ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nPidFile none\n"
        )
        (folder / "ssh_config").write_text(
            f"Host *\nIdentityFile {folder}/user_key\nStrictHostKeyChecking no\nBatchMode yes\n"
            "UserKnownHostsFile /dev/null\nLogLevel ERROR\nServerAliveInterval 3\n"
            "ServerAliveCountMax 2\n"
        )
        addresses = [f"10.77.0.{i + 1} {name}\n" for i, name in enumerate(self.names)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(addresses))


def why_not() -> str:
    """Why this machine cannot make such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "not root"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]:
        return f"no {', '.join(missing)}"
    probe = ["unshare", "-npmuif", "--mount-proc", "ip", "link", "add", "v0", "type", "veth"]
    done = subprocess.run([*probe, "peer", "name", "v1"], capture_output=True, text=True)
    return done.stderr.strip()


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where sshd and ip may be


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def _child_of(pid: int) -> int:
    """The first child of a process, once it has one."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    _until(lambda: bool(file.read_text().split()), "a host's first process")
    return int(file.read_text().split()[0])


def _until(seen: Any, what: str, logs: Path | None = None) -> None:
    deadline = time.monotonic() + 20
    while not seen():
        if time.monotonic() > deadline:
            told = "".join(p.read_text() for p in sorted(logs.glob("*.log"))) if logs else ""
            raise RuntimeError(f"waited in vain for {what}\n{told}")
        time.sleep(0.05)
