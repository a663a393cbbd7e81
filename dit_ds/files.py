"""Files that exist whole or not at all: atomic writes, and checksums to know them by."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_CHUNK = 1 << 22
_PATIENCE_SECONDS = 30.0
_SECONDS_BETWEEN_LOOKS = 0.1


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def seen(there: Callable[[], bool], *, seconds: float = _PATIENCE_SECONDS) -> bool:
    """Whether this host comes to see what another one wrote; it waits: shared file systems lag."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True


def wait_until_seen(folder: Path, sizes: dict[str, int]) -> None:
    """Wait until this host sees files that another one wrote, each half a minute at most.

    Raises:
        ValueError: that was not enough.
    """
    for name, size in sizes.items():
        if not seen(functools.partial(_has_size, folder / name, size)):
            raise ValueError(
                f"{folder / name} was written, but {socket.gethostname()} does not see it; put "
                "runs on storage that all hosts share"
            )


def _has_size(path: Path, size: int) -> bool:
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


def lock(path: Path) -> IO[bytes]:
    """Hold a file for this process alone, until the returned object or the process ends.

    A record lock, which forked workers do not inherit and most network file systems know.

    Raises:
        ValueError: another process holds it.
    """
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 - held open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        if e.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"{path.parent} is in use by {holder}") from e
        raise
    with contextlib.suppress(OSError):  # it is held, even where the disk is too full to say by whom
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def usual_permissions(path: Path) -> None:
    """Let others read as the umask says; safetensors makes files that only the owner can."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name to write to; what lies there afterwards appears under `path` whole, or not at all.

    A leftover of a process that was killed has the suffix `.tmp`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        usual_permissions(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk would not say which
        raise
    sync(path.parent)  # the rename is on the disk only after this


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """The same as an open file."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by `text`; after a crash it holds the old bytes or the new ones."""
    with atomic_file(path) as file:
        file.write(text.encode())


def printable(text: str) -> str:
    """The same without what steers a terminal: names in it may be anyone's."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
