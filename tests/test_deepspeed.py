"""Real launches, as a user makes them: `deepspeed --module dit_ds.train` from a shell."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.conftest import REPO

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
FP32 = REPO / "ds_configs" / "zero2_fp32.json"


def launch(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    """A launcher whose output is read as it comes."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return subprocess.Popen(
        [DEEPSPEED, "--master_port", str(port), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def ranks_of(pid: int) -> list[int]:
    """The rank processes below a launcher: those whose command line shows --local_rank."""
    found, parents = [], {pid}
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda p: int(p.parent.name)):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            words = (stat.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent in parents:
            parents.add(int(stat.parent.name))
            if any(w.startswith(b"--local_rank=") for w in words):
                found.append(int(stat.parent.name))
    return found


def test_a_launch_trains_and_sigterm_to_its_ranks_ends_it_in_good_order(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    arguments = ["--num_gpus", "2", "--module", "dit_ds.train"]
    arguments += runs.arguments(tiny, FP32, "train.steps=100000", "data.workers=1")
    with launch(*arguments, cwd=tmp_path) as process:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line)
            if line.startswith("step 5/"):
                for rank in ranks_of(process.pid)[:2]:  # loader workers are their children
                    os.kill(rank, signal.SIGTERM)
    text = "".join(told)
    assert process.returncode == 0, text
    assert "stopped as asked at step" in text and "Traceback" not in text
    latest = (tiny["run"] / "checkpoints" / "latest").read_text().strip()
    assert runs.metrics(tiny["run"])[-1]["step"] == int(latest.removeprefix("step-"))


@pytest.mark.parametrize("level", ["deepspeed", "launch.py"])
def test_ranks_save_and_end_when_a_launcher_is_killed(tiny: dict[str, Any], level: str) -> None:
    arguments = ["--num_gpus", "1", "--module", "dit_ds.train"]
    arguments += runs.arguments(
        tiny, FP32, "train.steps=1000000", "train.checkpoint_every=1000000", "train.log_every=1"
    )
    with launch(*arguments) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/"):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                (launcher,) = map(int, children.read_text().split())
                os.kill(process.pid if level == "deepspeed" else launcher, signal.SIGKILL)
                break
        deadline = time.monotonic() + 30
        while not (tiny["run"] / "done.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.stdout.read()  # to the end of the last process that holds it
    done = json.loads((tiny["run"] / "done.json").read_text())
    latest = (tiny["run"] / "checkpoints" / "latest").read_text()
    assert latest.strip() == f"step-{done['step']:08d}"


def test_a_hostfile_that_does_not_exist_is_refused_under_bare_deepspeed(
    tiny: dict[str, Any],
) -> None:
    arguments = ["--hostfile", "no/hosts", "--num_gpus", "1"]
    arguments += ["--module", "dit_ds.train", *runs.arguments(tiny, FP32)]
    with launch(*arguments) as process:
        text, _ = process.communicate()
    assert process.returncode != 0
    assert "no/hosts does not exist" in text and "Traceback" not in text
    assert not tiny["run"].exists()


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_at_most_the_steps_since_the_last_checkpoint(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    import random

    arguments = ["--num_gpus", "2", "--module", "dit_ds.train"]
    arguments += runs.arguments(tiny, FP32, "train.steps=60", "train.checkpoint_every=1")
    reached, moments = 0.0, random.Random(0)
    for _ in range(5):
        with launch(*arguments, start_new_session=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step "):
                    time.sleep(moments.random())  # the moment of the kill is the test's input
                    os.killpg(process.pid, signal.SIGKILL)
                    break
        lines = runs.metrics(tiny["run"])
        assert lines[-1]["step"] > reached
        reached = lines[-1]["step"] - 1
    with launch(*arguments) as process:
        text, _ = process.communicate()
    assert process.returncode == 0, text
    killed = runs.state_of(tiny["run"], 60)
    tiny["run"] = tmp_path / "undisturbed"
    with launch(*runs_to(arguments, tiny["run"])) as process:
        process.communicate()
    runs.assert_same_bits(killed, runs.state_of(tiny["run"], 60))


def runs_to(arguments: list[str], run: Path) -> list[str]:
    """The same command line with another run directory."""
    at = arguments.index("--run") + 1
    return [*arguments[:at], str(run), *arguments[at + 1 :]]
