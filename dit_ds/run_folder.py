"""The folder of a run as its supervisor sees it: who holds it, its logs, and how far it has come.

Without torch, which takes seconds and may be broken.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import IO

from dit_ds import files

_LAG_SECONDS = 60.0  # that a shared file system may take to show another host's file


def hold(run: Path, node_rank: int | None) -> IO[bytes]:
    """The run directory for this supervisor alone.

    Raises:
        ValueError: another one runs there, or it cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(
            f"--run {run} cannot be made ({e.strerror}); choose another run directory"
        ) from e
    try:
        return files.lock(
            run / (".supervisor" if node_rank is None else f".supervisor-{node_rank}")
        )
    except OSError as e:
        raise ValueError(f"--run {run} cannot be locked: {e}; choose another storage") from e
    except ValueError as e:
        raise ValueError(
            f"--run {run}: {e}; end that training first (SIGTERM to it), or choose another run "
            "directory"
        ) from e


def unmake(held: IO[bytes]) -> None:
    """Remove the folder of a run that never started, if nothing but what `hold` gave is in it."""
    lock = Path(held.name)
    with contextlib.suppress(OSError):  # an empty folder is no harm
        if list(lock.parent.iterdir()) == [lock]:
            lock.unlink()
            lock.parent.rmdir()


def new_logs(folder: Path) -> Path:
    """A new folder `attempt-NNNN` in it."""
    found = [re.fullmatch(r"attempt-(\d+)", path.name) for path in folder.glob("attempt-*")]
    number = max([int(match[1]) for match in found if match], default=0) + 1
    while True:
        logs = folder / f"attempt-{number:04d}"
        try:
            logs.mkdir(parents=True)
            return logs
        except FileExistsError:  # of another machine that is started by hand
            number += 1


def marker(run: Path | None) -> str:
    """What the last training that came to its end here has left to say so."""
    try:
        return (run / "done.json").read_text() if run else ""
    except OSError:
        return ""


def ended_well(run: Path | None, before: str, *, seconds: float = _LAG_SECONDS) -> bool:
    """Whether the training itself says that it is done; ranks that end with 0 are no proof."""
    over = time.monotonic() + seconds
    while run and marker(run) in ("", before):
        if time.monotonic() > over:
            return False
        time.sleep(0.2)
    return True


def saved_step(run: Path | None) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    try:
        return int((run / "checkpoints" / "latest").read_text().split("-")[-1]) if run else 0
    except (OSError, ValueError):
        return 0
