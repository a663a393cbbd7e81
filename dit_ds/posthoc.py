"""Averages of any length after the training, from snapshots of two that were kept in it.

    ema/step-00010000/     as `dit_ds.archive` has it, of the two averages alone

Every `post_hoc_ema.every` steps the two averages are saved as a checkpoint saves its state: each
rank the ranges it holds, in float32, whole or not at all, while training goes on. Half precision
would save half of the bytes, but the weights of a combination reach tens for short averages, and
so would multiply what it rounds off.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3 and appendix C.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from tqdm import tqdm

from dit_ds import distributed, profiles, zero
from dit_ds.archive import Checkpoint, CheckpointError, Ranges
from dit_ds.checkpoint import Checkpoints, remedy
from dit_ds.checkpoint_index import Index
from dit_ds.optim import PROFILES
from dit_ds.profiles import Profile
from dit_ds.retention import committed, remove, step_of
from dit_ds.settings import Length

TOLERANCE = 0.05
"""Most that the profile of a combination may differ from the wanted one, of that one's norm."""
_LENGTHS = pydantic.TypeAdapter(tuple[Length, Length])
_GRID = [i / 200 for i in range(1, 58)]


class Snapshots:
    """Saves the two averages of an engine; all methods are collectives at a step boundary.

    Args:
        engine: the DeepSpeed engine.
        root: the run's `ema` folder. What is there of steps after `step` goes: training has gone
            back, and comes there on another way.
        every: in steps.
        step: where the training is.
        last_step: where it is to end.
    """

    def __init__(self, engine: Any, root: Path, *, every: int, step: int, last_step: int) -> None:
        self._engine, self._every, self._pending = engine, every, False
        with distributed.agreed():
            if distributed.is_main():
                for path in committed(root):
                    if step_of(path) > step:
                        remove(path)
        self._store = Checkpoints(engine, root, None, keys=PROFILES)
        num, size = last_step // every - step // every, self._store.num_bytes()
        each, all_of_them = (tqdm.format_sizeof(n, "B") for n in (size, num * size))
        distributed.print_main(f"{num} snapshots of {each} to come in {root}, {all_of_them} in all")
        with distributed.agreed():
            if distributed.is_main() and shutil.disk_usage(root).free < num * size:
                distributed.warn_main(f"there is no room for all snapshots; {remedy(root)}")

    def due(self, step: int) -> bool:
        """Whether to save after this many steps."""
        return step % self._every == 0

    def save(self, *, step: int) -> None:
        """Begin to save; for what is raised, see `Checkpoints.save`."""
        states = zero.client_optimizer(self._engine).state.values()
        if not any(state and state["step"] > 0 for state in states):
            return  # all steps were skipped so far
        self._store.save(step=step, about={}, metrics={})
        self._pending = True

    def commit(self, *, wait: bool) -> bool:
        """Whether what was saved is committed now; for what is raised, see `Checkpoints.commit`."""
        if self._pending:
            try:
                self._pending = self._store.commit(wait=wait) is None
            except distributed.RankError:
                self._pending = False
                raise
        return not self._pending


def average(found: Checkpoint, root: Path, length: float) -> dict[str, torch.Tensor]:
    """The weights averaged with the profile of a length, until the step of a checkpoint.

    From the two averages in the checkpoint and, unless one of them has that length, those in the
    snapshots before it, whose every byte is checked. Damaged ones are told, and done without.

    Args:
        found: the checkpoint, verified.
        root: the run's `ema` folder.
        length: sigma_rel.

    Returns:
        Parameters by name, float32.

    Raises:
        ValueError: the run keeps no such averages, or too few for this length.
    """
    told = f"--ema-length {length}"
    if not 0 < length <= profiles.LONGEST:
        raise ValueError(
            f"{told}: lengths are above 0 and at most {profiles.LONGEST:.4f}, the mean of all steps"
        )
    if not set(PROFILES) <= set(found.index.keys):
        raise ValueError(
            f"{told}: {found.path} holds no averages for it; train with post_hoc_ema.every=STEPS"
        )
    sources = [found]
    if length not in _lengths(found):
        sources += _snapshots(root, found)
    stored = [profile for source in sources for profile in _profiles(source)]
    now = stored[0].time

    def combination(length: float) -> tuple[np.ndarray, float]:
        return profiles.combination(stored, Profile(now, profiles.exponent(length)))

    weights, left = combination(length)
    if left > TOLERANCE:
        lengths = sorted([*_GRID, *(profiles.length(p.gamma) for p in stored[: len(PROFILES)])])
        groups = itertools.groupby(lengths, lambda x: combination(x)[1] <= TOLERANCE)
        parts = [list(part) for fits, part in groups if fits]
        reached = " and ".join(f"{part[0]:.3g} to {part[-1]:.3g}" for part in parts)
        raise ValueError(
            f"{told}: with the {len(sources) - 1} snapshots in {root} its profile is {left:.0%} "
            f"off, more than {TOLERANCE:.0%}; lengths from {reached} can be had, and more with "
            "more snapshots (post_hoc_ema.every)"
        )
    distributed.print_main(
        f"EMA of length {length} from {found.path.name} and {len(sources) - 1} snapshots: its "
        f"profile is {left:.2%} off"
    )
    # Without what is nothing but rounding: then a length that was kept comes out bit by bit.
    factors = weights.round(12).reshape(len(sources), len(PROFILES))
    readers = [Ranges(source) for source in sources]
    mixed = {}
    for name, parameter in found.index.parameters.items():
        total = torch.zeros(parameter.shape, dtype=torch.float64)
        for reader, row in zip(readers, factors, strict=True):
            for key, factor in zip(PROFILES, row, strict=True):
                if factor:
                    total.add_(reader.whole(key, name), alpha=factor)
        mixed[name] = total.float()
    return mixed


def _snapshots(root: Path, until: Checkpoint) -> list[Checkpoint]:
    """Those before a checkpoint's step, newest first."""
    there, times = [], {_profiles(until)[0].time}
    for path in committed(root):
        if step_of(path) >= until.step:
            continue
        try:
            snapshot = Checkpoint.open(path, holding=PROFILES[0])
            snapshot.verify()
            if _shapes(snapshot.index) != _shapes(until.index):
                raise CheckpointError(f"{path} is of another model")
            time = _profiles(snapshot)[0].time
        except CheckpointError as e:
            distributed.warn_main(f"damaged snapshot not used: {e}")
            continue
        if time not in times:  # all steps between two may have been skipped, in fp16
            there.append(snapshot)
            times.add(time)
    return there


def _shapes(index: Index) -> dict[str, list[int]]:
    return {name: parameter.shape for name, parameter in index.parameters.items()}


def _lengths(source: Checkpoint) -> tuple[float, float]:
    try:
        return _LENGTHS.validate_python(source.index.groups[0]["ema_lengths"])
    except (LookupError, ValueError) as e:
        raise CheckpointError(f"{source.path} does not say the lengths of its averages") from e


def _profiles(source: Checkpoint) -> list[Profile]:
    """Of its two averages: how many steps they have seen, and their exponents."""
    index = source.index
    # Not the step that names it: those that were skipped, in fp16, are no part of an average.
    time = min((p.scalars.get("step", 0) for p in index.parameters.values()), default=0)
    if not set(PROFILES) <= set(index.keys) or time < 1:
        raise CheckpointError(f"{source.path} holds no averages of a known number of steps")
    return [Profile(time, profiles.exponent(length)) for length in _lengths(source)]
