"""What an agent can be asked about its host: `ANSWERS[name](**arguments)`, JSON in and out.

`dit_ds.preflight` asks, and compares. Standard library only, so that a host whose torch is broken
or missing can still say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dit_ds

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "pydantic", "diffusers", "webdataset")
_LISTEN_SECONDS = 60.0
_CONNECT_SECONDS = 3.0
# What one who asks has left here, by its token, until it says `forget`.
_marks: dict[str, Path] = {}
_listening: dict[str, socket.socket] = {}


def clock() -> float:
    """Seconds since the epoch, as this host sees it."""
    return time.time()


def facts(gpus: bool) -> dict[str, Any]:
    """What runs here, and on what; `gpus`: whether to look for any.

    A package that is not there has the version null, and so has a commit without git.
    """
    none = {"num_gpus": 0, "driver": None, "gpu_error": None}
    return {
        "hostname": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "code": _code(),
        "cores": len(os.sched_getaffinity(0)),
        "free_memory_bytes": _free_memory(),
        "interfaces": [name for _, name in socket.if_nameindex()],
        **(_gpus(none) if gpus else none),
    }


def storage(run: str, data: list[str], token: str) -> dict[str, Any]:
    """Free disk of the run's folder, a file renamed there, and the manifests of folders of data.

    The file, `mark`, is left for the other hosts to see (`marks`), until `forget`, in the lowest of
    the run's folders that there is, `folder`. `run` is an absolute path, or empty.
    """
    found: dict[str, Any] = {"folder": None, "mark": None, "mark_error": None}
    if run:
        folder = next(p for p in [Path(run), *Path(run).parents] if p.is_dir())
        found |= {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free}
        mark = folder / f".preflight-{token}-{socket.gethostname()}-{os.getpid()}"
        unnamed = mark.with_name(mark.name + ".tmp")
        _marks[token] = mark
        try:
            unnamed.write_text("dit_ds.preflight tries this storage with it\n")
            os.replace(unnamed, mark)
            found["mark"] = mark.name
        except OSError as e:
            found["mark_error"] = e.strerror
    return found | {"data": {path: _manifest(Path(path)) for path in data}}


def marks(names: list[str], patience: float, token: str) -> list[str]:
    """Those of the files `names` seen beside our own; waits for all, `patience` seconds at most."""
    folder, deadline = _marks[token].parent, time.monotonic() + patience
    while True:
        # Listing the folder above makes a network file system ask again for what it has cached.
        os.listdir(folder.parent)
        seen = sorted(set(names) & set(os.listdir(folder)))
        if len(seen) == len(names) or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


def listen(port: int, token: str) -> int:
    """Answer `reach` on a port (0: a free one) of all addresses, until `forget`; the port.

    Raises:
        OSError: another program has it.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)
    server.settimeout(_LISTEN_SECONDS)
    _listening[token] = server
    threading.Thread(target=_greet, args=(server, token.encode()), daemon=True).start()
    return int(server.getsockname()[1])


def _greet(server: socket.socket, token: bytes) -> None:
    with server, contextlib.suppress(OSError):  # `forget` shuts it down, or nobody comes
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_CONNECT_SECONDS)
                connection.sendall(token)
                connection.recv(1)  # the other side leaves first: then the port is free at once


def reach(address: str, port: int, token: str) -> bool:
    """Connect to the host that listens.

    Raises:
        OSError: there is no way, or another program answers.
    """
    with socket.create_connection((address, port), timeout=_CONNECT_SECONDS) as s:
        if s.recv(len(token)) != token.encode():
            raise ConnectionError("another program answers there")
    return True


def forget(token: str) -> None:
    """Stop listening, and remove our mark."""
    if server := _listening.pop(token, None):
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it
    if mark := _marks.pop(token, None):
        for path in (mark, mark.with_name(mark.name + ".tmp")):
            with contextlib.suppress(OSError):  # said when it was written
                path.unlink()


def content(path: str) -> str:
    """A text file of this host."""
    return Path(path).read_text()


ANSWERS: dict[str, Callable[..., Any]] = {
    "clock": clock,
    "facts": facts,
    "storage": storage,
    "marks": marks,
    "listen": listen,
    "reach": reach,
    "forget": forget,
    "content": content,
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the repository that the package lies in, with `+` for uncommitted changes."""
    command = ["git", "-C", str(Path(dit_ds.__file__).parent)]
    command += ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _code() -> str:
    """Hash of the package's own files, which tells versions apart where there is no git."""
    folder, digest = Path(dit_ds.__file__).parent, hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.yaml")]):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _gpus(none: dict[str, Any]) -> dict[str, Any]:
    """As nvidia-smi says, which knows what a container or a Slurm job may use."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except FileNotFoundError:
        return none
    except (OSError, subprocess.TimeoutExpired) as e:
        return none | {"gpu_error": str(e)}
    drivers = done.stdout.split()
    if done.returncode:  # such as a library that does not fit the kernel's module
        told = (done.stdout + done.stderr).strip() or f"exit code {done.returncode}"
        return none | {"gpu_error": told[:200]}
    return none | {"num_gpus": len(drivers), "driver": drivers[0] if drivers else None}


def _free_memory() -> int:
    with open("/proc/meminfo") as file:
        available = next(line for line in file if line.startswith("MemAvailable:"))
    return 1024 * int(available.split()[1])


def _manifest(folder: Path) -> dict[str, str | None]:
    try:
        data = (folder / "manifest.json").read_bytes()
    except OSError as e:
        return {"sha256": None, "error": e.strerror}
    return {"sha256": hashlib.sha256(data).hexdigest(), "error": None}
