"""A file from a URL: whole, verified, and asked for again when the network fails.

The URLs are those of fsspec: `https://`, `s3://`, `gs://`, `hf://`, ...
"""

from __future__ import annotations

import concurrent.futures
import errno
import gc
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from dit_ds import files
from dit_ds.manifest import ShardError
from dit_ds.parallel import in_background

NUM_ATTEMPTS = 5
BACKOFF_SECONDS = 1.0  # before the second attempt, doubled before each further one
STALL_SECONDS = 60.0  # without a new byte, an attempt has failed
_POLL_SECONDS = 0.2
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

T = TypeVar("T")


def download(
    url: str, path: Path, *, num_bytes: int | None = None, sha256: str | None = None
) -> None:
    """Fetch a file whole: `path` holds all of it, with this size and checksum, or is untouched.

    It comes beside `path` under a name of its own that ends in `.part`, which only a process that
    is killed leaves behind.

    Raises:
        ShardError: names the URL and why it cannot be had: no such file, no permission, no package
            for the protocol, no space; or what the last attempt met.
    """

    def attempt() -> None:
        # Never a name that was used before: a transfer that stalled may wake up and write on.
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            _watched(lambda: _get(url, part), lambda: _size(part))
            size = part.stat().st_size
            if num_bytes is not None and size != num_bytes:
                raise WrongContent(f"{size} bytes came, not the {num_bytes} it should have")
            if sha256 is not None and (found := files.sha256(part)) != sha256:
                raise WrongContent(
                    f"what came has the sha256 {found}, not {sha256}: the file there was altered"
                )
            files.sync(part)
            os.replace(part, path)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise no_space(url, path.parent) from error
            raise
        finally:
            part.unlink(missing_ok=True)

    _retried(url, attempt)


class WrongContent(Exception):  # noqa: N818 - users read the name
    """What came is not the file."""


def no_space(url: str, folder: Path) -> ShardError:
    """The error of a file that the disk of `folder` has no space for."""
    free = shutil.disk_usage(folder).free
    return ShardError(
        f"{url}: does not fit on the disk of {folder}, where {free:,} bytes are free; make room "
        "there, or choose a folder on a larger disk"
    )


def _filesystem(url: str) -> tuple[Any, str]:
    """A file system of our own and the path in it.

    One for each attempt. Connections do not survive a fork, and closing inherited ones would
    disturb the parent's; so nothing is kept that a later fork could inherit.
    """
    options: dict[str, Any] = {"skip_instance_cache": True}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # By default a transfer that takes more than 5 minutes is ended, however well it goes.
        options["timeout"] = aiohttp.ClientTimeout(
            sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS
        )
    return fsspec.url_to_fs(url, **options)


def _get(url: str, part: Path) -> None:
    filesystem, name = _filesystem(url)
    filesystem.get_file(name, str(part))


def remote_size(url: str) -> int | None:
    """A file's bytes, None where the protocol does not tell. Raises as `download` does."""

    def ask() -> int | None:
        filesystem, name = _filesystem(url)
        return filesystem.info(name).get("size")

    return _retried(url, lambda: _watched(ask, lambda: 0))


def _size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _watched(work: Callable[[], T], progress: Callable[[], int]) -> T:
    """The result of `work`; a TimeoutError once `progress` stands still for `STALL_SECONDS`.

    It runs in a thread, because protocols differ in what they notice and none can be interrupted.
    """
    result = in_background(work)
    last, since = progress(), time.monotonic()
    while not concurrent.futures.wait([result], timeout=_POLL_SECONDS).done:
        if (now := progress()) != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > STALL_SECONDS:
            raise TimeoutError(f"no byte came for {STALL_SECONDS:.0f} s")
    return result.result()


def _retried(url: str, attempt: Callable[[], T]) -> T:
    """The result of the first attempt that works, waiting longer from one to the next."""
    told = ""
    _freeze_once()
    for number in range(NUM_ATTEMPTS):
        if number:
            # Machines that failed together should not come back together.
            jitter = random.SystemRandom().uniform(0.5, 1.0)
            time.sleep(BACKOFF_SECONDS * 2 ** (number - 1) * jitter)
        try:
            return attempt()
        except ShardError:
            raise
        except ImportError as error:
            package = url.partition("://")[0].replace("https", "http")
            raise ShardError(
                f'{url}: its protocol needs a package: {error}; pip install "fsspec[{package}]"'
            ) from error
        except Exception as error:  # every protocol has its own kinds
            told, final = _judged(error)
            if final:
                raise ShardError(f"{url}: {told}; check the URL and who may read it") from error
        finally:
            # fsspec's objects are cycles. They close their connections when they are collected,
            # which must not happen to happen in a process forked from this one.
            gc.collect()
    raise ShardError(
        f"{url}: cannot be fetched, after {NUM_ATTEMPTS} attempts: {told}; check the network and "
        "the file, then run the same command again"
    )


_frozen_in = 0  # the process


def _freeze_once() -> None:
    """Take what is there already, torch and all, out of what each attempt's collection searches."""
    global _frozen_in
    if _frozen_in != os.getpid():
        _frozen_in = os.getpid()
        gc.collect()
        gc.freeze()


def _judged(error: BaseException) -> tuple[str, bool]:
    """What to tell of an error, and whether trying again is no use."""
    # fsspec's `info` says of any trouble with http that there is no such file.
    if (cause := error.__cause__) and type(cause).__module__.startswith("aiohttp"):
        error = cause
    told = f"{type(error).__name__}: {error}"
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return f"there is no such file ({told})", True
    if isinstance(status, int) and 400 <= status < 500:
        return told, status not in (408, 425, 429)  # timeout, too early, too many requests
    return told, isinstance(error, PermissionError | ValueError)  # ValueError: unknown protocol
