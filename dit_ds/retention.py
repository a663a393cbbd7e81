"""Which checkpoints of a run there are, and which of them stay.

A folder named `step-N` with an index is a committed checkpoint. What begins with a dot is a save
that has not been committed, or a checkpoint that is being removed.
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
        if path.name[5:].isdecimal()
        and path == folder(root, step_of(path))
        and (path / "index.json").exists()
    ]
    return sorted(found, key=step_of, reverse=True)


def tidy(root: Path, keep: Keep, *, newest: int) -> None:
    """Remove what `keep` does not name, after the checkpoint of step `newest` was committed.

    Steps above that go too: they were damaged or never told of, or training would have gone on from
    them. Damaged ones below do not count, and are left to `tools/checkpoint.py prune`.

    Raises:
        OSError: something could not be removed.
    """
    whole = []
    for path in committed(root):
        if step_of(path) > newest:
            remove(path)
            continue
        with contextlib.suppress(CheckpointError):
            checkpoint = Checkpoint.open(path)
            checkpoint.check_headers()
            whole.append(checkpoint)
    stay = keep.of(whole)
    for checkpoint in whole:
        if checkpoint.step not in stay:
            remove(checkpoint.path)


def remove(path: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves nothing that looks like one.

    Raises:
        OSError: it could not be removed; that it is gone already is none.
    """
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old.tmp")
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        files.sync(path.parent)  # or a power cut might give the name back to what is left
        if doomed.is_symlink():
            doomed.unlink()  # what it points to is not ours
        else:
            shutil.rmtree(doomed)


def remove_leftovers(root: Path) -> None:
    """Delete what killed saves and removals have left; for who holds the run alone."""
    for killed in root.glob(".step-*.tmp"):
        shutil.rmtree(killed, ignore_errors=True)
