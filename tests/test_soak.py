"""A training that is killed thirty times and goes on with other numbers of ranks: what it costs."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dit_ds.archive import Checkpoint
from dit_ds.manifest import Manifest
from tests import runs
from tests.conftest import kill_ranks, run_ranks
from tests.test_checkpoint import load_and_save

STEPS, CYCLES = 400, 30
LENGTH = [f"train.steps={STEPS}", "train.checkpoint_every=5", "train.keep_checkpoints=2"]


def train_with_ledger(ledger: str, alive_seconds: float, *arguments: str) -> None:
    """Train; every rank writes down which samples each step took. Killed after a while."""
    from dit_ds import distributed, monitor

    add, log = monitor.Monitor.add, monitor.Monitor.log
    taken: list[tuple[int, int]] = []
    watch: threading.Timer | None = None

    def add_and_note(self: Any, losses: Any, batch: Any, *rest: Any) -> None:
        kept = batch.weight > 0
        taken.extend(zip(batch.epochs[kept].tolist(), batch.ids[kept].tolist(), strict=True))
        add(self, losses, batch, *rest)

    def log_and_note(self: Any, *rest: Any, step: int, **named: Any) -> None:
        nonlocal watch
        with open(f"{ledger}-{distributed.rank()}.jsonl", "a") as file:
            file.write(json.dumps([step, taken]) + "\n")
        taken.clear()
        log(self, *rest, step=step, **named)
        if alive_seconds and watch is None:  # from the first step on
            watch = threading.Timer(alive_seconds, os.kill, (os.getpid(), signal.SIGKILL))
            watch.daemon = True
            watch.start()

    monitor.Monitor.add = add_and_note  # type: ignore[assignment, method-assign]
    monitor.Monitor.log = log_and_note  # type: ignore[method-assign]
    runs.train(*arguments)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_and_other_worlds_change_nothing(tiny: dict[str, Any], tmp_path: Path) -> None:
    moments, ledgers = random.Random(0), []
    ds = {
        stage: runs.write_json(tmp_path / f"{stage}.json", {"zero_optimization": {"stage": stage}})
        for stage in (1, 2, 3)
    }
    curves = {}
    for world in (1, 2):
        tiny["run"] = tmp_path / f"undisturbed-{world}"
        run_ranks(world, runs.train, *runs.arguments(tiny, ds[2], *LENGTH))
        curves[world] = runs.losses(tiny["run"])

    tiny["run"] = tmp_path / "killed"
    newest = 0
    for cycle in range(CYCLES):
        world, stage = moments.choice((1, 2, 3)), moments.choice((1, 2, 3))
        if newest:  # the state is bitwise the same in the world and stage that go on
            run_ranks(world, load_and_save, tiny, str(ds[stage]), str(tmp_path / f"c{cycle}"))
            before = runs.state_of(tiny["run"], newest)
            runs.assert_same_bits(before, runs.state_of(tmp_path / f"c{cycle}", 3))
        ledgers.append(tmp_path / f"ledger-{cycle:02d}")
        arguments = runs.arguments(tiny, ds[stage], *LENGTH)
        codes = kill_ranks(world, train_with_ledger, str(ledgers[-1]), moments.random(), *arguments)
        assert -signal.SIGKILL in codes
        newest = newest_step(tiny["run"])
    assert 0 < newest < STEPS
    ledgers.append(tmp_path / "ledger-last")
    arguments = runs.arguments(tiny, ds[2], *LENGTH)
    run_ranks(3, train_with_ledger, str(ledgers[-1]), 0.0, *arguments)

    check_ledger(ledgers, Manifest.load(tiny["tree"]["data"]["path"]))
    curve = runs.losses(tiny["run"])
    one, two = curves[1], curves[2]
    assert len(curve) == len(one) == STEPS
    assert curve[:50] == pytest.approx(two[:50], rel=1e-5)
    drift = 0.0
    for killed, a, b in zip(curve, one, two, strict=True):
        drift = max(drift, abs(a - b) / abs(b))
        assert abs(killed - b) / abs(b) <= max(1e-5, 10 * drift)


def newest_step(run: Path) -> int:
    """Step of the newest committed checkpoint; 0 before the first."""
    latest = run / "checkpoints" / "latest"
    if not latest.exists():
        return 0
    found = Checkpoint.open(latest.parent / latest.read_text().strip())
    found.verify()
    return found.step


def check_ledger(ledgers: list[Path], manifest: Manifest) -> None:
    """Every sample once an epoch, counting of each step the last process that took it."""
    counted: dict[int, list[tuple[int, int]]] = {}
    for ledger in ledgers:
        mine: dict[int, list[tuple[int, int]]] = {}
        for path in sorted(ledger.parent.glob(f"{ledger.name}-*.jsonl")):
            for line in path.read_text().splitlines():
                step, taken = json.loads(line)
                mine.setdefault(step, []).extend(map(tuple, taken))
        counted |= mine
    assert sorted(counted) == list(range(1, STEPS + 1))
    assert {len(taken) for taken in counted.values()} == {12}
    times = Counter(sample for taken in counted.values() for sample in taken)
    assert set(times.values()) == {1}
    whole = STEPS * 12 // manifest.num_samples  # epochs
    for epoch in range(whole):
        assert {i for e, i in times if e == epoch} == set(range(manifest.num_samples))
