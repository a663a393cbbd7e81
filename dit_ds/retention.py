"""Which checkpoints of a run there are, and which of them stay.

A folder named `step-N` is a committed checkpoint: it was given that name when it was whole. What
begins with a dot is a save that has not been committed, or a checkpoint that is being removed.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dit_ds import files
from dit_ds.archive import Checkpoint, CheckpointError, folder_name


@dataclass(frozen=True)
class Keep:
    """The newest `last`; those whose step is a multiple of `every`; the one with least `best`.

    every: in steps, 0 for none. best: a metric that is better the smaller it is, as
    `validation_ema/loss`, or empty; among equals the newest.
    """

    last: int
    every: int = 0
    best: str = ""

    def of(self, checkpoints: Iterable[Checkpoint]) -> set[int]:
        """The steps that stay. At least one, if there is any."""
        found = sorted(checkpoints, key=lambda c: c.step, reverse=True)
        steps = {c.step for c in found[: max(1, self.last)]}
        steps |= {c.step for c in found if self.every and c.step % self.every == 0}
        measured = [c for c in found if self.best in c.index.metrics]
        if measured:
            steps.add(min(measured, key=lambda c: c.index.metrics[self.best]).step)
        return steps

    def __str__(self) -> str:
        parts = [f"the newest {self.last}" if self.last > 1 else "the newest"]
        parts += [f"every {self.every}th step"] if self.every else []
        return " and ".join(parts + ([f"the least {self.best}"] if self.best else []))


def folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / folder_name(step)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def committed(root: Path) -> list[Path]:
    """Folders of committed checkpoints, newest first; whether they are whole is not looked at."""
    # One name for each step: nothing else is taken for a checkpoint, or removed as one.
    found = [
        path
        for path in root.glob("step-*")
        if path.name[5:].isdecimal() and path == folder(root, step_of(path)) and path.is_dir()
    ]
    return sorted(found, key=step_of, reverse=True)


def latest(root: Path) -> Path | None:
    """The committed checkpoint that `latest` names, if it names one."""
    file, name = root / "latest", ""
    if file.is_file():
        with open(file, errors="replace") as text:
            name = text.readline(100).strip()
    return next((path for path in committed(root) if path.name == name), None)


def tidy(root: Path, keep: Keep, *, newest: int) -> list[str]:
    """Remove what `keep` does not name, after the checkpoint of step `newest` was committed.

    Steps above that go too: they were damaged or never told of, or training would have gone on from
    them. Damaged ones below do not count, and are left to `tools/checkpoint.py prune`.

    Returns:
        The names of those that went.

    Raises:
        OSError: something could not be removed.
    """
    paths, whole = committed(root), []
    gone = [path for path in paths if step_of(path) > newest]
    for path in paths:
        if path not in gone:
            with contextlib.suppress(CheckpointError):
                checkpoint = Checkpoint.open(path)
                checkpoint.check_headers()
                whole.append(checkpoint)
    stay = keep.of(whole)
    gone += [c.path for c in whole if c.step not in stay]
    for path in gone:
        remove(path)
    return [path.name for path in gone]


def remove(path: Path) -> None:
    """Delete a checkpoint or a leftover; a kill in the middle leaves nothing like a checkpoint.

    Raises:
        OSError: it could not be removed; that it is gone already is none.
    """
    doomed = path
    with contextlib.suppress(FileNotFoundError):
        if not path.name.startswith("."):
            doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old.tmp")
            path.rename(doomed)
            files.sync(path.parent)  # or a power cut might give the name back to what is left
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()  # what it points to is not ours


def leftovers(root: Path) -> list[Path]:
    """What killed saves and removals have left, or a save that goes on just now."""
    return sorted(root.glob(".step-*.tmp"))


def remove_leftovers(root: Path) -> None:
    """Delete them; for who holds the run alone."""
    for killed in leftovers(root):
        shutil.rmtree(killed, ignore_errors=True)
