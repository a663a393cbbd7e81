"""Attempts: what is started again, what is not, and what counts as done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dit_ds import console, run_folder, supervisor
from dit_ds.diagnosis import Event
from dit_ds.fleet import Outcome
from dit_ds.hosts import Host
from dit_ds.supervisor import Failure
from tests import runs
from tests.conftest import REPO

FP32 = REPO / "ds_configs" / "zero2_fp32.json"


def launch(script: str, *words: str, **more: Any) -> subprocess.Popen[str]:
    """`launch/SCRIPT`, on CPU ranks."""
    return subprocess.Popen(
        [str(REPO / "launch" / script), *words],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_listen,
        **more,
    )


def _listen() -> None:
    """As in a terminal, also where these tests run in the background or under nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def tool(folder: Path, code: str, *words: str) -> tuple[int, str]:
    """Run a script in two ranks: exit code and output."""
    (folder / "tool.py").write_text("import os, sys, pathlib\nrank = os.environ['RANK']\n" + code)
    script = ["--num_gpus", "2", *words, str(folder / "tool.py"), "--odd", "a $HOME 'b' \\ {c}"]
    process = launch("run.sh", *script, cwd=folder)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def test_a_tool_that_fails_is_started_again(tmp_path: Path) -> None:
    code = "file = pathlib.Path('tries' + rank)\n"
    code += "tries = len(file.read_text()) if file.exists() else 0\n"
    code += "file.write_text('x' * (tries + 1))\nprint(sys.argv[1:])\n"
    code += "sys.exit('too early' if tries < 1 and rank == '1' else 0)\n"
    status, out = tool(tmp_path, code, "--max-restarts", "3")
    assert status == 0, out
    assert out.count("rank 1 on localhost ended with exit code 1") == 1 and "too early" in out
    assert str(["--odd", "a $HOME 'b' \\ {c}"]) in out
    assert len(list((tmp_path / "runs" / "logs" / "tool").glob("attempt-*/rank-00001.log"))) == 2


def test_hosts_that_cannot_be_had_at_first_are_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text("")
    (tmp_path / "hosts").write_text("localhost slots=1\nno-such-host.invalid slots=1\n")
    words = ["--hostfile", str(tmp_path / "hosts"), "--max-restarts", "3"]
    with launch("run.sh", *words, str(tmp_path / "tool.py"), cwd=tmp_path) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "FAULT no-such-host.invalid" in out, out
    assert "FAILED: not all hosts can be used" in out and "restart" not in out
    assert not (tmp_path / "runs").exists()


def test_a_users_mistake_is_not_tried_again(tmp_path: Path) -> None:
    status, out = tool(tmp_path, "sys.exit(2)", "--max-restarts", "3")
    assert status == 2 and out.count("FAILED") == 1


def test_a_training_that_ends_without_saying_so_has_failed(tiny: dict[str, Any]) -> None:
    """As under a launcher whose exit code is 0 whatever happened."""
    assert not run_folder.ended_well(tiny["run"], "", seconds=0.5)
    tiny["run"].mkdir()
    (tiny["run"] / "done.json").write_text("{}")
    assert run_folder.ended_well(tiny["run"], "", seconds=0.5)
    assert not run_folder.ended_well(tiny["run"], "{}", seconds=0.5)  # of the attempt before
    assert run_folder.ended_well(None, "", seconds=0.5)


def test_a_training_is_killed_comes_back_and_is_done(tiny: dict[str, Any]) -> None:
    words = runs.arguments(tiny, FP32, "train.steps=60", "train.checkpoint_every=5")
    with launch("train.sh", "--num_gpus", "2", "--max-restarts", "2", *words) as process:
        deadline = time.monotonic() + 60
        latest = tiny["run"] / "checkpoints" / "latest"
        while not latest.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        subprocess.run(["pkill", "-9", "-n", "-f", f"dit_ds.train.*{tiny['run']}"], check=True)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "was killed by SIGKILL" in out and "restart 1 of 2" in out
    assert "done at step 60" in out
    assert json.loads((tiny["run"] / "done.json").read_text())["step"] == 60
    assert [int(m["step"]) for m in runs.metrics(tiny["run"]) if "loss" in m] == list(range(1, 61))


class Scripted:
    """Stands for a fleet, and for the clock: each run of a job is a word of `attempts`.

    A number: the attempt fails, and the newest checkpoint is of that step. `done`: it ends well.
    `unfit`: preflight refuses. `stop` is asked for in the pause after the attempt before it.
    """

    def __init__(self, run: Path | None, attempts: list[int | str]) -> None:
        self.run_folder, self.attempts, self.now = run, attempts, 0.0
        self.hosts, self.world_size = [Host("here", (0,))], 1
        self.handlers: dict[int, Any] = {}

    def __call__(self, *_: Any, **__: Any) -> Scripted:
        return self

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def fit(self, *_: Any, **__: Any) -> bool:
        return self.attempts[0] != "unfit"

    def run(self, *_: Any, **__: Any) -> Outcome:
        attempt = self.attempts.pop(0)
        if self.run_folder:
            (self.run_folder / "checkpoints").mkdir(exist_ok=True)
            if attempt == "done":
                (self.run_folder / "done.json").write_text(str(self.now))
            else:
                latest = self.run_folder / "checkpoints" / "latest"
                latest.write_text(f"step-{attempt:08d}\n")
        return Outcome(0) if attempt == "done" else Outcome(1, "x", Event("ended", "here", 0, 1), 9)

    def end(self) -> list[str]:
        return []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.attempts[0] == "stop":
            self.handlers[signal.SIGTERM](signal.SIGTERM, None)


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Supervise attempts that are written down; the exit code."""

    def supervised(*attempts: int | str, run: Path | None = None, max_restarts: int = 1) -> int:
        fleet = Scripted(run, list(attempts))
        monkeypatch.setattr(supervisor, "Fleet", fleet)
        monkeypatch.setattr(supervisor, "fit", fleet.fit)
        monkeypatch.setattr(supervisor, "time", fleet)
        monkeypatch.setattr(signal, "signal", fleet.handlers.__setitem__)
        words = ["--max-restarts", str(max_restarts), str(REPO / "tools" / "sample.py")]
        target = supervisor.Target(["x"], tmp_path / "logs", run)
        code = supervisor.supervise(supervisor.parse(words)[0], target)
        console.flush()
        return code

    return supervised


def test_restarts_are_counted_since_something_was_saved(
    scripted: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert scripted(10, 20, 30, "done", run=tmp_path / "run") == 0
    assert capfd.readouterr().out.count("restart 1 of 1") == 3
    assert scripted(10, 20, 20, "never", run=tmp_path / "other") == 1
    assert scripted(0, 0, "never") == 1  # a tool


def test_who_is_asked_to_stop_before_a_restart_does_as_asked(
    scripted: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert scripted(10, "stop", run=tmp_path / "run") == 0
    assert "stopped as asked, before the restart" in capfd.readouterr().out
    assert scripted(0, "stop") == 1  # a tool has not done what it was to do


def test_a_refused_launch_leaves_no_folder(scripted: Callable[..., int], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert scripted("unfit", run=run) == 1 and not run.exists()
    run.mkdir()
    (run / "config.yaml").write_text("")
    assert scripted("unfit", run=run) == 1 and (run / "config.yaml").exists()


def test_a_folder_that_cannot_be_made_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be made .Not a directory.; choose"):
        run_folder.hold(tmp_path / "file" / "run", None)


def failure(step: int, saved: int, host: str = "n1") -> Failure:
    return Failure(Outcome(1, "why", Event("ended", host), step), saved)


def test_the_same_failure_again_and_again_ends_it() -> None:
    same = [failure(12, 10)] * 3
    assert "3 attempts in a row failed at step 12, always first on n1" in supervisor.hopeless(same)
    assert "on one host or another" in supervisor.hopeless([*same[:2], failure(12, 10, "n2")])
    for other in ([failure(13, 10)], [failure(12, 11)]):
        assert not supervisor.hopeless([*other, *same[:2]])
    assert not supervisor.hopeless(same[:2])


def test_hosts_that_are_lost_are_waited_for() -> None:
    nobody = Failure(Outcome(1, "there are no hosts to start on"), 10)
    lost = Failure(Outcome(1, "why", Event("lost", "n1")), 10)
    assert not supervisor.hopeless([nobody] * 3) and not supervisor.hopeless([lost] * 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--master_port", "99999"], "--master_port 99999: ports go from 1 to 65535"),
        (["--node_rank", "1"], "--node_rank 1 is this machine's place"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        supervisor.parse([*words, str(REPO / "tools" / "sample.py")])


def test_attempts_are_numbered_on_whatever_lies_beside_them(tmp_path: Path) -> None:
    for name in ("attempt-0007", "attempt-0009.old", "attempt-8.tar.gz"):
        (tmp_path / name).mkdir()
    made = [run_folder.new_logs(tmp_path).name for _ in range(2)]
    assert made == ["attempt-0008", "attempt-0009"]


def test_a_host_that_is_away_at_one_restart_is_back_at_the_next(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text("import sys; sys.exit(1)")
    (tmp_path / "hosts").write_text("far slots=1\n")
    calls = tmp_path / "calls"
    script = f"echo x >> {calls}\n[ $(wc -l < {calls}) = 2 ] && exit 255\n"
    script += 'exec bash -c "${@: -1}"\n'  # what ssh would have run there
    (tmp_path / "ssh").write_text("#!/bin/bash\n" + script)
    (tmp_path / "ssh").chmod(0o755)
    words = [
        "--hostfile",
        str(tmp_path / "hosts"),
        "--max-restarts",
        "2",
        str(tmp_path / "tool.py"),
    ]
    done = subprocess.run(
        ["python", "-m", "dit_ds.supervisor", *words],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "there are no hosts to start on" in done.stdout and "restart 2 of 2" in done.stdout
    assert done.stdout.count("rank 0 on far ended with exit code 1") == 2
    assert "restart 3" not in done.stdout


def test_a_second_launch_of_a_run_is_refused(tmp_path: Path) -> None:
    held = run_folder.hold(tmp_path / "run", None)
    code = "from pathlib import Path; from dit_ds import run_folder\n"
    code += f"run_folder.hold(Path({str(tmp_path / 'run')!r}), None)"
    done = subprocess.run(["python", "-c", code], capture_output=True, text=True)
    assert f"in use by process {os.getpid()} on" in done.stderr
    del held
    assert subprocess.run(["python", "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_tool_that_is_interrupted_ends(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "tool.py").write_text("import time; print('here', flush=True); time.sleep(99)")
    with launch("run.sh", "--num_gpus", "2", str(tmp_path / "tool.py"), cwd=tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("here"):
                break
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "stopped as asked" in out and "FAILED" not in out


def test_a_closing_terminal_and_an_early_request_to_save_end_nothing(tmp_path: Path) -> None:
    code = "import signal, time\nasked = []\n"
    code += "signal.signal(signal.SIGTERM, lambda *a: asked.append(1))\n"
    code += "print('here', flush=True)\nwhile not asked: time.sleep(0.1)\n"
    code += "time.sleep(1)\nprint('saved', flush=True)\n"
    (tmp_path / "tool.py").write_text(code)
    words = ["--num_gpus", "1", str(tmp_path / "tool.py")]
    with launch("run.sh", *words, cwd=tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("here"):
                break
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        for _ in range(2):  # a terminal's own, and its shell's
            process.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "saved" in out and "FAILED" not in out, out


def test_a_run_that_was_done_has_not_failed(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "if 'dit_ds.train' in sys.orig_argv: atexit.register(os.kill, os.getpid(), 11)\n"
    )
    (tmp_path / "cluster.env").write_text(f"PYTHONPATH={tmp_path}\n")
    words = ["--env-file", str(tmp_path / "cluster.env"), *runs.arguments(tiny, FP32)]
    with launch("train.sh", "--num_gpus", "1", *words) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "the run was done before this" in out, out


def test_what_is_printed_waits_for_no_reader_and_fits_any_locale() -> None:
    code = "import sys, time; from dit_ds.console import show; began = time.monotonic()\n"
    code += "for _ in range(3000): show('caf\\xe9 ' * 200 + '\\n')\n"
    code += "print(time.monotonic() - began, file=sys.stderr)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        ["python", "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert float(process.stderr.readline()) < 2  # and nobody has read so far
        assert process.stdout.read(200).startswith(b"caf\\xe9 caf\\xe9 ")
