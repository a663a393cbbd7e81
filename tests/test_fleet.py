"""Ranks that an agent starts and watches: they end as one, and the first failure is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dit_ds import processes
from dit_ds.fleet import Asked, Fleet, Job, Outcome
from dit_ds.hosts import Host

LIMITS = {"start": 5.0, "compile": 2.0, "step": 2.0, "save": 2.0, "sample": 2.0}
ODD = ["a b", "", "$HOME `x` \\ \"'", "{d}&;", "ä\n"]


def run(
    folder: Path, script: str, ranks: int = 2, *, asked: Asked | None = None, **more: Any
) -> Outcome:
    """Run ranks whose code is `script`, with `rank` and `beat` at hand."""
    path = folder / "rank.py"
    path.write_text(
        "import os, signal, subprocess, sys, time\nfrom dit_ds.beats import beat, begin\n"
        f"rank = int(os.environ['RANK'])\nbegin()\n{script}"
    )
    job = Job([str(path), *ODD], folder / "logs", limits=LIMITS)
    with Fleet([Host("localhost", tuple(range(ranks)))]) as fleet:
        return fleet.run(job, asked or Asked(), **more)


def log(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank-{rank:05d}.log").read_text()


def test_ranks_know_their_world_and_words_arrive_as_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR")
    script = f"print([os.environ[n] for n in {names}], os.environ['MASTER_PORT'].isdigit())\n"
    assert run(tmp_path, script + "print(sys.argv[1:])", 3) == Outcome(0)
    for rank in range(3):
        world = f"['{rank}', '{rank}', '3', '3', '127.0.0.1'] True\n{ODD}\n"
        assert log(tmp_path, rank) == world
    told = capfd.readouterr().out
    assert log(tmp_path, 0) in told and log(tmp_path, 1) not in told


def test_a_rank_that_fails_ends_all_and_is_named(tmp_path: Path) -> None:
    script = (
        "beat('step', 7, 'micro-step 1')\nif rank: raise RuntimeError('no more')\ntime.sleep(99)"
    )
    began = time.monotonic()
    outcome = run(tmp_path, script, 3)
    assert time.monotonic() - began < 10
    assert outcome.code == 1 and outcome.step == 7
    assert "on localhost ended with exit code 1 in phase step at step 7" in outcome.why
    assert "RuntimeError: no more" in outcome.why
    assert outcome.cause and "raise RuntimeError" in outcome.cause.tail


def test_a_rank_that_is_killed_goes_before_those_that_miss_it(tmp_path: Path) -> None:
    script = "if rank == 1:\n  os.kill(os.getpid(), 9)\nsys.exit('Connection reset by peer')"
    outcome = run(tmp_path, script, 3)
    assert "rank 1 on localhost was killed by SIGKILL" in outcome.why


def test_a_rank_that_leaves_too_early_is_named(tmp_path: Path) -> None:
    script = "if rank == 1: sys.exit(0)\ntime.sleep(1)\nsys.exit('Connection reset by peer')"
    outcome = run(tmp_path, script, 3)
    assert outcome.code == 1
    assert "rank 1 on localhost ended with exit code 0 before the others" in outcome.why


def test_what_hangs_is_named_with_what_it_did(tmp_path: Path) -> None:
    script = (
        "for i in range(20):\n  beat('step', 3, 'data')\n  time.sleep(0.1)\n"
        "if not rank: beat('step', 3, 'compute')\ntime.sleep(99)"
    )
    outcome = run(tmp_path, script)
    assert outcome.code == 1
    assert "rank 1 on localhost has not moved for" in outcome.why
    assert "in phase step at step 3 (data); the limit" in outcome.why
    assert "--step-timeout 2" in outcome.why


def test_a_stopped_rank_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    script = "beat('save', 4)\nif rank: beat('save', 4, 'x'); os.kill(os.getpid(), signal.SIGSTOP)"
    outcome = run(tmp_path, script + "\ntime.sleep(99)")
    assert "rank 1 on localhost" in outcome.why and "it is stopped (SIGSTOP" in outcome.why


def test_long_work_that_beats_is_no_stall(tmp_path: Path) -> None:
    script = "for i in range(40):\n  beat('step', 0, f'micro-step {i}')\n  time.sleep(0.1)"
    assert run(tmp_path, script).code == 0


def test_nothing_that_ranks_leave_behind_survives(tmp_path: Path) -> None:
    sleeper = "import time; time.sleep(987)"
    script = (
        f"child = subprocess.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)\n"
        "print(child.pid, flush=True)\nif rank: time.sleep(1); sys.exit(3)\ntime.sleep(99)"
    )
    assert run(tmp_path, script).code == 1
    for rank in range(2):
        assert processes.state(int(log(tmp_path, rank))) in ("", "Z")


def test_a_users_mistake_is_passed_on_as_such(tmp_path: Path) -> None:
    assert run(tmp_path, "sys.exit(2)").code == 2


@pytest.mark.parametrize("obeys", [True, False])
def test_asked_to_stop_ranks_have_a_time_to_save(tmp_path: Path, obeys: bool) -> None:
    script = (
        "stop = []\nsignal.signal(signal.SIGTERM, lambda *a: stop.append(1))\n"
        f"while not (stop and {obeys}):\n  beat('step')\n  time.sleep(0.05)"
    )
    asked = Asked()

    def ask() -> None:
        asked.stop = True

    threading.Timer(1.5, ask).start()
    outcome = run(tmp_path, script, asked=asked, save_seconds=1.5)
    assert outcome.code == (not obeys)
    assert obeys or "--save-timeout 1.5" in outcome.why


def test_ranks_end_when_their_agent_is_stopped_or_killed(tmp_path: Path) -> None:
    script = "open(f'pid{rank}', 'w').write(f'{os.getpid()} {os.getppid()}')\n"
    script += "while True: beat('step'); time.sleep(0.1)"
    for number in (signal.SIGSTOP, signal.SIGKILL):
        folder = tmp_path / str(number)
        folder.mkdir()
        code = f"import os; os.chdir({str(folder)!r})\nfrom pathlib import Path\n"
        code += f"import tests.test_fleet as t; print(t.run(Path.cwd(), {script!r}))"
        supervisor = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            text=True,
        )
        pids = [folder / "pid0", folder / "pid1"]
        deadline = time.monotonic() + 20
        while not all(p.exists() and p.read_text() for p in pids):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks, (agent, _) = zip(*[map(int, p.read_text().split()) for p in pids], strict=True)
        os.kill(agent, number)
        out, _ = supervisor.communicate(timeout=30)
        assert "localhost was lost" in out
        deadline = time.monotonic() + 8
        while any(processes.state(rank) not in ("", "Z") for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_host_that_does_not_answer_is_told_with_the_reason() -> None:
    with Fleet([Host("localhost", (0,)), Host("no.such.host.invalid", (0,))]) as fleet:
        assert [host.name for host in fleet.hosts] == ["localhost"]
        assert list(fleet.unreachable) == ["no.such.host.invalid"]
        values, errors = fleet.ask("free_port")
        assert 0 < values["localhost"] < 65536 and not errors
