"""Which checkpoints of a run there are, and which of them stay.

A folder named `step-N` is a committed checkpoint: it was given that name when it was whole. What
begins with a dot is a save that has not been committed, or a checkpoint that is being removed.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from dit_ds import files
from dit_ds.archive import Checkpoint, CheckpointError, Unreadable, folder_name


@dataclass(frozen=True)
class Keep:
    """The newest `last`; those whose step is a multiple of `every`; the one with least `best`.

    every: in steps, 0 for none. best: a metric that is better the smaller it is, as
    `validation_ema/loss`, or empty; among equals the newest.
    """

    last: int
    every: int = 0
    best: str = ""

    def of(self, metrics: dict[int, dict[str, float]]) -> set[int]:
        """The steps that stay, of those with these metrics. At least one, if there is any."""
        newest_first = sorted(metrics, reverse=True)
        steps = set(newest_first[: max(1, self.last)])
        steps |= {step for step in newest_first if self.every and step % self.every == 0}
        measured = [step for step in newest_first if self.best in metrics[step]]
        if measured:
            steps.add(min(measured, key=lambda step: metrics[step][self.best]))
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


def tidy(root: Path, keep: Keep, *, newest: int, known: dict[int, dict[str, float]]) -> list[str]:
    """Remove what `keep` does not name, after the checkpoint of step `newest` was committed.

    Steps above that go too: they were damaged or never told of, or training would have gone on from
    them. What cannot be read now may be whole, and stays. Damaged ones below do not count, and are
    left to `tools/checkpoint.py prune`.

    Args:
        root: the `checkpoints` folder.
        keep: the rule.
        newest: step of the newest one.
        known: metrics by step of checkpoints that need not be opened again; more are added.

    Returns:
        The names of those that went.

    Raises:
        OSError: some could not be removed.
    """
    whole: dict[int, dict[str, float]] = {}
    gone = []
    for path in committed(root):
        step = step_of(path)
        try:
            if step > newest or step not in known:
                checkpoint = Checkpoint.open(path)
                checkpoint.check_headers()
                known[step] = checkpoint.index.metrics
            whole[step] = known[step]
        except Unreadable:
            continue
        except CheckpointError:
            if step <= newest:
                continue
        if step > newest:
            whole.pop(step, None)
            gone.append(path)
    stay = keep.of(whole)
    gone += [folder(root, step) for step in whole if step not in stay]
    faults = []
    for path in gone:
        try:
            remove(path)
        except OSError as e:
            faults.append(str(e))
    if faults:
        raise OSError("; ".join(faults))
    return [path.name for path in gone]


Identity = tuple[int, int, int]


def identity(path: Path) -> Identity:
    """What tells a checkpoint from one that took its name later; OSError if it is gone."""
    found = path.lstat()
    # The time too, in which a checkpoint's folder got its index: file systems use inodes again.
    return found.st_dev, found.st_ino, found.st_mtime_ns


def remove(path: Path, *, only: Identity | None = None) -> bool:
    """Delete a checkpoint or a leftover; a kill in the middle leaves nothing like a checkpoint.

    Args:
        path: what to delete.
        only: that one; another one that has its name meanwhile stays.

    Returns:
        False if another one stays. That it is gone already counts as deleted.

    Raises:
        OSError: it could not be removed.
    """
    doomed = path
    with contextlib.suppress(FileNotFoundError):
        if only is not None and identity(path) != only:
            return False
        if not path.name.startswith("."):
            doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old.tmp")
            path.rename(doomed)
            if only is not None and identity(doomed) != only:  # it came this very moment
                doomed.rename(path)
                return False
            files.sync(path.parent)  # or a power cut might give the name back to what is left
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()  # what it points to is not ours
    return True


def leftovers(root: Path) -> list[Path]:
    """What killed saves and removals have left, or a save that goes on just now."""
    return sorted(root.glob(".step-*.tmp"))


def remove_leftovers(root: Path) -> None:
    """Delete them; for who holds the run alone."""
    for killed in leftovers(root):
        shutil.rmtree(killed, ignore_errors=True)
