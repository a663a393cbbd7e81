"""What a kill, a power cut or a full disk leaves of a save, at every single step of it."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dit_ds import distributed
from tests import runs
from tests.conftest import REPO, kill_ranks, run_ranks

FP32 = REPO / "ds_configs" / "zero2_fp32.json"


class Faults:
    """Counts what a process does to the disk, and calls `act` just before one of these things.

    Files that were written but not synced, and renames whose folder was not, are known: after a
    power cut they may be gone.
    """

    def __init__(self, at: int, act: Callable[[Faults], None]) -> None:
        self.count = 0
        self._at, self._act = at, act
        self._unsynced: dict[int, int] = {}  # inode: a descriptor of its own
        self._renames: list[tuple[str, str, bytes | None]] = []

    def happens(self) -> None:
        self.count += 1
        if self.count == self._at:
            self._act(self)

    def lose_data(self) -> None:
        """A power cut: bytes that no fsync waited for are not there."""
        for descriptor in self._unsynced.values():
            os.ftruncate(descriptor, 0)

    def lose_names(self) -> None:
        """A power cut: renames whose folder was not synced did not happen."""
        for source, target, before in reversed(self._renames):
            real_rename(target, source)
            if before is not None:
                Path(target).write_bytes(before)

    # What is put in place of the system's functions.

    def open(self, path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wxa"):
            return real_open(path, mode, *rest, **named)
        self.happens()
        file = real_open(path, mode, *rest, **named)
        self._unsynced[os.fstat(file.fileno()).st_ino] = os.dup(file.fileno())
        return Torn(file, self)

    def fsync(self, descriptor: int) -> None:
        self.happens()
        real_fsync(descriptor)
        self._unsynced.pop(os.fstat(descriptor).st_ino, None)
        with contextlib.suppress(OSError):
            folder = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(folder):
                self._renames = [r for r in self._renames if os.path.dirname(r[1]) != folder]

    def rename(self, source: Any, target: Any, **named: Any) -> None:
        self.happens()
        source, target = os.fspath(source), os.fspath(target)
        before = Path(target).read_bytes() if os.path.isfile(target) else None
        real_rename(source, target)
        self._renames.append((source, target, before))

    def simple(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            self.happens()
            return function(*arguments, **named)

        return called


real_open, real_fsync, real_rename = builtins.open, os.fsync, os.rename


class Torn:
    """A file whose writes arrive in two halves."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        self._faults.happens()
        half = len(data) // 2
        written = self._file.write(data[:half])
        self._file.flush()
        self._faults.happens()
        return written + self._file.write(data[half:])

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def injected(at: int, act: Callable[[Faults], None]) -> Iterator[Faults]:
    """Everything that a save does to the disk passes through `Faults`."""
    from dit_ds import files, staging

    faults = Faults(at, act)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "open", faults.open, raising=False)
        patch.setattr(staging, "open", faults.open, raising=False)
        patch.setattr(os, "fsync", faults.fsync)
        patch.setattr(os, "rename", faults.rename)
        patch.setattr(os, "replace", faults.rename)
        for name in ("mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, faults.simple(getattr(os, name)))
        yield faults


def kill(faults: Faults) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power(faults: Faults) -> None:
    """Data and names that were not synced are gone."""
    faults.lose_data()
    faults.lose_names()
    kill(faults)


def cut_power_after_names(faults: Faults) -> None:
    """The file system wrote the names of its own accord, and not the data."""
    faults.lose_data()
    kill(faults)


# ------------------------------------------------------------------------- one rank, every point


@pytest.mark.parametrize("act", [kill, cut_power, cut_power_after_names])
def test_no_point_of_a_save_leaves_garbage(
    tiny: dict[str, Any], act: Callable[[Faults], None], tmp_path: Path
) -> None:
    run_ranks(1, runs.train, *runs.arguments(tiny, FP32, "train.steps=3"))
    ((found, num_points),) = run_ranks(1, die_everywhere, tiny, act, str(tmp_path / "work"))
    assert num_points > 25 and len(found) == num_points
    # The old one until the commit, the new one ever after.
    assert found == sorted(found) and set(found) == {3, 6}


def die_everywhere(
    tiny: dict[str, Any], act: Callable[[Faults], None], work: str
) -> tuple[list[int], int]:
    """Which step is the newest after a save that died at its n-th point, for every n."""
    from dit_ds import checkpoint, restore
    from dit_ds.retention import Keep

    engine, about = runs.engine(tiny["recipe"], FP32)
    base, root = Path(tiny["run"]) / "checkpoints", Path(work)
    before = restore.newest(base)
    assert before is not None
    restore.load(engine, before)
    before.verify()
    expected = runs.state_of(Path(tiny["run"]), 3)

    def save(step: int) -> None:
        checkpoints = checkpoint.Checkpoints(engine, root / "checkpoints", Keep(1))
        checkpoints.save(step=step, about=about, metrics={})
        assert checkpoints.commit(wait=True) is not None

    def saved_in_a_child(at: int) -> bool:
        """Whether it came to its end."""
        pid = os.fork()
        if pid == 0:
            with injected(at, act):
                save(6)
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0

    found: list[int] = []
    for at in range(1, 200):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root / "checkpoints")
        ended = saved_in_a_child(at)
        newest = restore.newest(root / "checkpoints", strict=True)
        assert newest is not None
        if ended:
            assert newest.step == 6
            return found, at - 1
        found.append(newest.step)
        runs.assert_same_bits(expected, runs.state_of(root, newest.step))
        # The next start works, and leaves no trace of it.
        save(9)
        left = sorted(os.listdir(root / "checkpoints"))
        assert left == ["latest", "step-00000009"], (at, left)
    raise AssertionError("the save did not end")


# ------------------------------------------------------------------------- several ranks, trained


def train_and_die(rank: int, at: int, *arguments: str) -> None:
    """Train, and be killed at the `at`-th thing that this rank does to the disk."""
    if distributed_rank() != rank:
        return runs.train(*arguments)
    with injected(at, kill):
        runs.train(*arguments)


def distributed_rank() -> int:
    """Before the process group is there."""
    return int(os.environ["RANK"])


def test_ranks_killed_in_the_middle_of_saves_cost_no_bit(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    length = ["train.steps=24", "train.checkpoint_every=2", "train.keep_checkpoints=2"]
    run_ranks(2, runs.train, *runs.arguments(tiny, FP32, *length))
    undisturbed, curve = runs.state_of(tiny["run"], 24), runs.losses(tiny["run"])
    tiny["run"] = tmp_path / "killed"
    arguments = runs.arguments(tiny, FP32, *length)
    moments, reached = random.Random(0), 0
    for cycle in range(6):
        # Rank 0 does about 30 things for a save, the other one 5.
        rank = cycle % 2
        at = moments.randint(20, 90) if rank == 0 else moments.randint(2, 14)
        codes = kill_ranks(2, train_and_die, rank, at, *arguments)
        assert codes[rank] == -signal.SIGKILL
        latest = tiny["run"] / "checkpoints" / "latest"
        now = int(latest.read_text().strip()[5:]) if latest.exists() else 0
        assert now >= reached
        reached = now
    assert reached > 2
    run_ranks(2, runs.train, *arguments)
    runs.assert_same_bits(undisturbed, runs.state_of(tiny["run"], 24))
    assert runs.losses(tiny["run"]) == curve
    names = sorted(os.listdir(tiny["run"] / "checkpoints"))
    assert names == ["latest", "step-00000022", "step-00000024"]


def train_with_a_slow_disk(seconds: float, *arguments: str) -> str:
    """Train where every file of a checkpoint takes a while; what was printed, with the times."""
    import io

    from dit_ds import staging

    write = staging.write

    def slow(data: memoryview, path: Path) -> Any:
        time.sleep(seconds)  # the disk of this test, not a wait for something
        return write(data, path)

    staging.write = slow
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runs.train(*arguments)
    return out.getvalue()


def test_training_goes_on_while_a_checkpoint_is_written(tiny: dict[str, Any]) -> None:
    arguments = runs.arguments(tiny, FP32, "train.steps=30", "train.checkpoint_every=4")
    told = run_ranks(2, train_with_a_slow_disk, 0.3, *arguments)[0].splitlines()
    saved = [i for i, line in enumerate(told) if line.startswith("saved ")]
    first = told.index(next(line for line in told if line.startswith("step 4/")))
    # Steps after the fourth came before its checkpoint was there, and the next save waited for it.
    assert any(line.startswith("step 5/") for line in told[first : saved[0]])
    assert "step-00000004" in told[saved[0]]
    assert len(saved) == 8 and "step-00000030" in told[saved[-1]]


def fail_to_write(number: int, *arguments: str) -> None:
    """Train where rank 1's disk fails with this error at the first checkpoint."""
    from dit_ds import staging

    write = staging.write

    def failing(data: memoryview, path: Path) -> Any:
        if "rank-00001" in path.name and "step-00000002" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return write(data, path)

    staging.write = failing
    runs.train(*arguments)


def test_a_failed_write_is_an_error_of_all_at_the_next_boundary(tiny: dict[str, Any]) -> None:
    arguments = runs.arguments(tiny, FP32, "train.checkpoint_every=2", "train.steps=200")
    told = run_ranks(2, fail_to_write, errno.EIO, *arguments, expect=2)
    assert told[0].count("\nerror: ") == 1 and "Traceback" not in told[0]
    assert "step-00000002 could not be written: " in told[0]
    assert "Input/output error" in told[0] and "(rank 1 on " in told[0]
    assert runs.metrics(tiny["run"])[-1]["step"] < 5


def test_a_disk_full_on_one_host_is_told_and_tried_again(tiny: dict[str, Any]) -> None:
    arguments = runs.arguments(tiny, FP32, "train.checkpoint_every=2")
    told = run_ranks(2, train_told, errno.ENOSPC, *arguments)[0]
    assert "WARNING: checkpoint" in told and "No space left on device" in told
    assert "training goes on and tries again at the next save" in told
    names = sorted(os.listdir(tiny["run"] / "checkpoints"))
    assert names == ["latest", "step-00000004", "step-00000006"]


def train_told(number: int, *arguments: str) -> str:
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        fail_to_write(number, *arguments)
    return out.getvalue()


def train_without_room(free: int, *arguments: str) -> str:
    """Train where the disk has so many bytes left."""
    import io

    usage = shutil.disk_usage

    def almost_full(path: Any) -> Any:
        return usage(path)._replace(free=free)

    shutil.disk_usage = almost_full
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        with contextlib.suppress(SystemExit):
            runs.train(*arguments)
    return out.getvalue()


def test_room_is_looked_for_before_anything_is_written(tiny: dict[str, Any]) -> None:
    told = run_ranks(2, train_without_room, 1 << 20, *runs.arguments(tiny, FP32))[0]
    assert "WARNING: there is no room for 4 checkpoints now: " in told
    assert "WARNING: checkpoint" in told and "tools/checkpoint.py prune" in told
    assert "error: checkpoint" in told
    assert len(runs.metrics(tiny["run"])) == 6
    assert not os.listdir(tiny["run"] / "checkpoints")


def resume_with_a_lag(root: str, seconds: float) -> tuple[int, list[int]]:
    """What rank 1 goes on from where it sees the newest checkpoint only after a while."""
    from dit_ds import files, restore

    began, real = time.monotonic(), os.stat

    def lagging(path: Any, *rest: Any, **named: Any) -> Any:
        if "step-00000006" in str(path) and time.monotonic() - began < seconds:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return real(path, *rest, **named)

    distributed.init()
    if distributed.rank() == 1:
        files.os.stat = lagging
    found = restore.newest(Path(root))
    files.os.stat = real
    assert found is not None
    return found.step, sorted(int(p.name[5:]) for p in Path(root).glob("step-*"))


def test_a_file_system_that_lags_is_no_damage(tiny: dict[str, Any]) -> None:
    run_ranks(1, runs.train, *runs.arguments(tiny, FP32))
    root = str(tiny["run"] / "checkpoints")
    assert run_ranks(2, resume_with_a_lag, root, 1.0) == [(6, [3, 6])] * 2


def fail_to_remove(*arguments: str) -> str:
    """Train where old checkpoints cannot be removed."""
    import io

    from dit_ds import retention

    def failing(path: Path, **_: object) -> bool:
        raise RuntimeError(f"{path.name} sticks")

    retention.remove = failing
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        runs.train(*arguments)
    return out.getvalue()


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(tiny: dict[str, Any]) -> None:
    settings = ["train.checkpoint_every=2", "train.keep_checkpoints=1"]
    told = run_ranks(2, fail_to_remove, *runs.arguments(tiny, FP32, *settings))
    assert "step-00000002 sticks" in told[0] and "done at step 6" in told[0]
