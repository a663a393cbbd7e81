"""What checkpoints a run has, whether they are whole, and which of them could go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_ds import retention
from dit_ds.archive import Checkpoint, CheckpointError, Unreadable
from dit_ds.retention import Identity, Keep, committed, identity, latest, leftovers, step_of


def num_bytes(path: Path) -> int:
    """Size of a file, or of those in a folder. Links are not followed; what vanishes is nothing."""

    def size(file: str | Path) -> int:
        try:
            return os.lstat(file).st_size
        except OSError:
            return 0

    if path.is_symlink() or not path.is_dir():
        return size(path)
    return sum(size(os.path.join(at, name)) for at, _, names in os.walk(path) for name in names)


@dataclass(frozen=True)
class Found:
    """A committed checkpoint as it was found.

    checkpoint: absent if its index is of no use. fault: what is wrong with its index, ranges,
    headers or sizes. latest: `latest` names it. newer: than that one, so that no resume takes it,
    and the next save removes it. identity: of the folder that this is about.
    """

    path: Path
    identity: Identity
    checkpoint: Checkpoint | None
    fault: CheckpointError | None
    latest: bool
    newer: bool


def look(root: Path) -> list[Found]:
    """All committed checkpoints, newest first; reads no values."""
    named = latest(root)  # before the list: a checkpoint may be committed between them
    found = []
    for path in committed(root):
        checkpoint, fault = None, None
        try:
            looked_at = identity(path)
        except FileNotFoundError:
            continue  # the training has removed it meanwhile
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.check_headers()
        except CheckpointError as e:
            fault = e
        if path.is_dir():  # or a removal made the fault
            newer = named is not None and step_of(path) > step_of(named)
            latest_is = path == named
            found.append(Found(path, looked_at, checkpoint, fault, latest=latest_is, newer=newer))
    return found


def usable(found: list[Found]) -> list[Checkpoint]:
    """Those that a resume would take, as far as headers tell; newest first."""
    return [f.checkpoint for f in found if f.checkpoint and not f.fault and not f.newer]


def rule_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of `Keep` in the run that saved it; none if it says nothing that makes sense.

    A checkpoint's configuration may be anyone's and anything.
    """
    tree: Any = checkpoint.index.about
    for name in ("config", "train"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        return {}
    last, every, best = (tree.get(f"keep_{name}") for name in ("checkpoints", "every", "best"))
    best = "" if best is None else best
    fits = type(last) is type(every) is int and isinstance(best, str) and last > 0 <= every
    return {"last": last, "every": every, "best": best} if fits else {}


@dataclass(frozen=True)
class Plan:
    """What a prune is to do, newest first, with the reasons.

    keep: the rule, absent if nothing is whole. stay: whole to the last byte, of at most the step
    that `latest` names; if there is none, nothing is removed. leave: not ours to judge. identities:
    of the folders that were looked at. latest: what `latest` named then.
    """

    keep: Keep | None
    stay: list[Path]
    remove: dict[Path, str]
    leave: dict[Path, str]
    identities: dict[Path, Identity]
    latest: Path | None


def plan(root: Path, asked: dict[str, Any], *, alone: bool) -> Plan:
    """Decide what goes. Reads all bytes of what is to stay, and removes nothing.

    Args:
        root: the `checkpoints` folder.
        asked: arguments of `Keep` that take the place of the run's own.
        alone: no training can be running here; else what might be its own is left to it.

    Raises:
        ValueError: nobody says how many to keep, or nothing was measured by the metric asked for.
    """
    found = look(root)
    faults = {f.path: f.fault for f in found if f.fault is not None}
    good = usable(found)
    named = {f.path for f in found if f.latest}
    verified: set[Path] = set()
    while True:
        keep = _rule(good, asked) if good else None
        steps = keep.of({c.step: c.index.metrics for c in good}) if keep else set()
        stay = [c for c in good if c.step in steps or c.path in named]
        unsure = next((c for c in stay if c.path not in verified), None)
        if unsure is None:
            break
        try:
            unsure.verify()
            verified.add(unsure.path)
        except CheckpointError as e:  # does not count: the one before it takes its place
            faults[unsure.path] = e
            good.remove(unsure)
    kept = [c.path for c in stay]
    # Where the one that latest names is damaged, a newer one may be what is wanted after all.
    newer_go = alone and not named.isdisjoint(kept)
    remove: dict[Path, str] = {}
    leave: dict[Path, str] = {}
    for f in found:
        if f.path in kept or not f.path.is_dir():
            continue  # or the training has removed it meanwhile
        fault = faults.get(f.path)
        damage = f"damaged: {fault}" if fault else ""
        if isinstance(fault, Unreadable):
            leave[f.path] = str(fault)
        elif f.newer:
            (remove if newer_go else leave)[f.path] = damage or "newer than what latest names"
        else:
            remove[f.path] = damage or "not kept by the rule"
    for path in leftovers(root):
        (remove if alone else leave)[path] = "of a save that was not committed, or of a removal"
    if found and not stay:
        remove, leave = {}, leave | remove
    identities = {f.path: f.identity for f in found}
    return Plan(keep, kept, remove, leave, identities, latest=next(iter(named), None))


def carry_out(root: Path, plan: Plan) -> tuple[dict[Path, str], dict[Path, str]]:
    """Remove what a plan says, and nothing that came since it was made.

    Returns:
        What was left for that, with the reasons; and what could not be removed.
    """
    left: dict[Path, str] = {}
    faults: dict[Path, str] = {}
    for path in plan.remove:
        try:
            if path == latest(root) != plan.latest:
                left[path] = "what latest names now"
            elif not retention.remove(path, only=plan.identities.get(path)):
                left[path] = "saved again meanwhile"
        except OSError as e:
            faults[path] = f"{path} could not be removed: {e}"
    return left, faults


def _rule(good: list[Checkpoint], asked: dict[str, Any]) -> Keep:
    settings = rule_of(good[0]) | asked
    if "last" not in settings:
        raise ValueError(f"{good[0].path} does not say how many checkpoints to keep; give --keep N")
    if asked.get("best") and not any(asked["best"] in c.index.metrics for c in good):
        metrics = sorted({name for c in good for name in c.index.metrics})
        raise ValueError(
            f"--keep-best {asked['best']}: was measured at no checkpoint; "
            + (f"choose one of {', '.join(metrics[:8])}" if metrics else "nothing was")
        )
    return Keep(**settings)
