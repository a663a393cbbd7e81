"""Whatever dies or hangs, on whichever host: it is noticed, named, and nothing is left running."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.conftest import REPO, run_ranks
from tests.multinode.conftest import DEEPSPEED, start, told
from tests.multinode.lab import Lab

pytestmark = pytest.mark.multinode
LIMIT, CLEAN = 10, 30
TIMEOUTS = [f"--{p}-timeout={LIMIT}" for p in ("step", "save", "sample")]
TIMEOUTS += ["--start-timeout=90", "--compile-timeout=60"]
ENDLESS = ["train.steps=1000000", "train.log_every=1", "train.checkpoint_every=1000"]


def pids(lab: Lab, host: str, what: str = r"dit_ds\.(train|agent|supervisor)") -> list[int]:
    """Processes of ours on a host, as it numbers them; none on one that is off."""
    if not lab.is_on(host):
        return []
    found = subprocess.run(lab.command(host, "pgrep", "-f", f"^[^ ]*python.* -m {what}"),
                           capture_output=True, text=True)  # fmt: skip
    return [int(pid) for pid in found.stdout.split()]


def send(lab: Lab, host: str, what: str, number: signal.Signals) -> None:
    """A signal to a process of ours on a host."""
    wanted = pids(lab, host, what)
    assert wanted, f"no {what} on {host}"
    subprocess.run(lab.command(host, "kill", f"-{number.value}", *map(str, wanted)), check=True)


def until(seen: Callable[[], Any], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def last_step(run: Path) -> int:
    """The last step that a run has logged."""
    with contextlib.suppress(OSError):
        return int(max([m["step"] for m in runs.metrics(run)], default=0))
    return 0


def train(
    lab: Lab, tmp_path: Path, tiny: dict[str, Any], hosts: list[str], *words: str, **more: Any
) -> subprocess.Popen[str]:
    """`launch/train.sh` on n1 for a rank on each host."""
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
    hostfile = lab.hostfile(tmp_path / "hosts", hosts)
    command = [str(REPO / "launch" / "train.sh"), "--hostfile", str(hostfile), *TIMEOUTS]
    command += runs.arguments(tiny, ds, *words)
    return start(lab, hosts[0], tmp_path, *command, **more)


@contextlib.contextmanager
def running(lab: Lab, tmp_path: Path, tiny: dict[str, Any], *words: str) -> Iterator[Any]:
    """A training on two hosts that has made some steps; nothing is left of it afterwards."""
    process = train(lab, tmp_path, tiny, ["n1", "n2"], *ENDLESS, *words)
    try:
        until(lambda: last_step(tiny["run"]) >= 3 or process.poll() is not None, 90, "step 3")
        assert process.poll() is None, told(process)
        yield process
    finally:
        if lab.is_on("n2"):
            lab.join("n2")
        else:
            lab.boot("n2")
            lab.wait_for("n2")
        for host in ("n1", "n2"):
            for pid in pids(lab, host):
                subprocess.run(lab.command(host, "kill", "-9", str(pid)))
        process.send_signal(signal.SIGCONT)  # nsenter stops with the process it has started
        process.communicate(timeout=30)


FAULTS: dict[str, tuple[Callable[[Lab], None], str]] = {
    "a rank is killed": (
        lambda lab: send(lab, "n2", "dit_ds.train", signal.SIGKILL),
        r"rank 1 on n2 was killed by SIGKILL in phase step at step \d+",
    ),
    "a rank is stopped": (
        lambda lab: send(lab, "n2", "dit_ds.train", signal.SIGSTOP),
        r"rank 1 on n2 has not moved for 1\d s in phase step at step \d+ .*; it is stopped",
    ),
    "rank 0 is stopped": (
        lambda lab: send(lab, "n1", "dit_ds.train", signal.SIGSTOP),
        r"rank 0 on n1 has not moved for 1\d s in phase step at step \d+ .*; it is stopped",
    ),
    "an agent is killed": (
        lambda lab: send(lab, "n2", "dit_ds.agent", signal.SIGKILL),
        r"n2 was lost: the way to its agent",
    ),
    "an agent is stopped": (
        lambda lab: send(lab, "n2", "dit_ds.agent", signal.SIGSTOP),
        r"n2 was lost: not heard for 1\d s",
    ),
    "ssh is killed": (
        lambda lab: send_ssh(lab),
        r"n2 was lost: the way to its agent was killed",
    ),
    "a link is cut": (
        lambda lab: lab.cut("n2"),
        r"n2 was lost: not heard for 1\d s; the host is down, stopped or cut off",
    ),
    "a host is switched off": (
        lambda lab: lab.lose("n2"),
        r"n2 was lost: not heard for 1\d s; the host is down, stopped or cut off",
    ),
}


def send_ssh(lab: Lab) -> None:
    subprocess.run(lab.command("n1", "pkill", "-9", "-f", "^ssh .*n2"), check=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed_and_named_and_nothing_is_left(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    act, sentence = FAULTS[fault]
    with running(lab, tmp_path, tiny) as process:
        began = time.monotonic()
        act(lab)
        text = told(process, expect=1, timeout=LIMIT + CLEAN)
        took = time.monotonic() - began
        assert re.search(r"\[supervisor\] FAILED: " + sentence, text), text
        over = LIMIT + CLEAN - took
        until(lambda: not pids(lab, "n1") and not pids(lab, "n2"), over, "all to be gone")
        print(f"{fault}: told after {took:.1f} s, all gone after {time.monotonic() - began:.1f} s")
        assert not (tiny["run"] / "done.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_hosts_end_when_their_supervisor_is_gone_or_silent(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    with running(lab, tmp_path, tiny):
        send(lab, "n1", "dit_ds.supervisor", number)
        ours = r"dit_ds\.(train|agent)"
        until(lambda: not pids(lab, "n1", ours) and not pids(lab, "n2", ours), LIMIT + CLEAN, "end")


def test_processes_that_cannot_be_killed_are_named(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path
) -> None:
    """A storage that hangs holds them in the kernel."""
    disk, folder = tmp_path / "disk", tiny["run"] / "checkpoints"
    folder.mkdir(parents=True)
    disk.write_bytes(bytes(30 << 20))
    if subprocess.run(["mkfs.ext4", "-q", str(disk)]).returncode:
        pytest.skip("no disk can be made here")
    mounted = lab.command("n1", "mount", "-o", "loop", str(disk), str(folder))
    if subprocess.run(mounted).returncode:
        pytest.skip("no disk can be mounted here")
    process = train(lab, tmp_path, tiny, ["n1"], *ENDLESS[:2], "train.checkpoint_every=20")
    try:
        until(lambda: last_step(tiny["run"]) >= 25, 90, "step 25")
        subprocess.run(lab.command("n1", "fsfreeze", "-f", str(folder)), check=True)
        text = told(process, expect=1, timeout=LIMIT + CLEAN)
        assert re.search(r"FAILED: rank 0 on n1 has not moved for 1\d s in phase save", text), text
        assert re.search(r"could not be killed, on n1: process \d+, state D", text), text
    finally:
        subprocess.run(lab.command("n1", "fsfreeze", "-u", str(folder)))
        until(lambda: not pids(lab, "n1"), 10, "the end of what was held")
        subprocess.run(lab.command("n1", "umount", str(folder)), check=True)


def test_sigterm_saves_and_a_second_launch_is_refused(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path
) -> None:
    with running(lab, tmp_path, tiny) as process:
        second = told(train(lab, tmp_path, tiny, ["n1", "n2"], *ENDLESS), expect=2)
        assert f"{tiny['run'].name} is in use by process" in second
        send(lab, "n1", "dit_ds.supervisor", signal.SIGTERM)
        text = told(process)
        assert "stopped as asked at step" in text
    done = json.loads((tiny["run"] / "done.json").read_text())
    assert 0 < done["step"] < done["last_step"]
    latest = (tiny["run"] / "checkpoints" / "latest").read_text()
    assert latest.strip() == f"step-{done['step']:08d}"


def test_a_lost_host_is_left_out_and_taken_back(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path
) -> None:
    steps = 600
    length = [f"train.steps={steps}", "train.log_every=1", "train.checkpoint_every=20"]
    run = tiny["run"]

    def ranks() -> list[str]:
        return json.loads((run / "environment.json").read_text())["ranks"]

    process = train(lab, tmp_path, tiny, ["n1", "n2", "n3"], "--max-restarts=3", *length)
    try:
        until(lambda: last_step(run) >= 50, 90, "step 50")
        assert ranks() == ["n1 cpu", "n2 cpu", "n3 cpu"]
        lab.lose("n3")
        until((run / "logs" / "attempt-0002").is_dir, 90, "a restart")
        until(lambda: ranks() == ["n1 cpu", "n2 cpu"] and last_step(run) >= 100, 90, "two hosts")
    finally:
        lab.boot("n3")
        lab.wait_for("n3")
    send(lab, "n2", "dit_ds.train", signal.SIGKILL)
    text = told(process)
    assert "going on without n3" in text and ranks() == ["n1 cpu", "n2 cpu", "n3 cpu"]
    assert len(list((run / "logs").iterdir())) == 3

    # Nothing of it shows in the curve, beyond what the order of sums does to any two runs.
    curves = []
    ds = tmp_path / "ds.json"
    for world in (1, 2):
        tiny["run"] = tmp_path / f"undisturbed-{world}"
        run_ranks(world, runs.train, *runs.arguments(tiny, ds, *length))
        curves.append(runs.losses(tiny["run"]))
    curve, (one, two) = runs.losses(run), curves
    assert len(curve) == len(one) == steps
    assert curve[:50] == pytest.approx(two[:50], rel=1e-5)
    drift = 0.0
    for disturbed, a, b in zip(curve, one, two, strict=True):
        drift = max(drift, abs(a - b) / abs(b))
        assert abs(disturbed - b) / abs(b) <= max(1e-5, 10 * drift)


def test_what_fails_at_the_same_step_again_and_again_is_not_tried_for_ever(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, threading, time\n"
        "def wait():\n"
        "    while 'dit_ds.beats' not in sys.modules: time.sleep(0.1)\n"
        "    beats = sys.modules['dit_ds.beats']\n"
        "    while not hasattr(beats, 'begin'): time.sleep(0.1)\n"
        "    beat = beats.beat\n"
        "    def fail(phase, step=0, doing=''):\n"
        "        beat(phase, step, doing)\n"
        "        if step == 5: os.kill(os.getpid(), 11)\n"
        "    beats.beat = fail\n"
        "if 'dit_ds.train' in sys.orig_argv: threading.Thread(target=wait, daemon=True).start()\n"
    )
    environment = tmp_path / "cluster.env"
    environment.write_text(f"PYTHONPATH={tmp_path}\n")
    options = ["--max-restarts=9", "--env-file", str(environment)]
    text = told(train(lab, tmp_path, tiny, ["n1"], *options, "train.steps=9"), expect=1)
    assert text.count("rank 0 on n1 was killed by SIGSEGV in phase step at step 5") == 3, text
    assert "3 attempts in a row failed at step 5, always first on n1" in text
    assert "nothing was saved since step 3" in text


def test_ranks_of_deepspeeds_launcher_end_when_pdsh_is_killed(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
    hostfile = lab.hostfile(tmp_path / "hosts", ["n1", "n2"])
    words = ["--hostfile", str(hostfile), "--module", "dit_ds.train"]
    process = start(lab, "n1", tmp_path, DEEPSPEED, *words, *runs.arguments(tiny, ds, *ENDLESS))
    try:
        until(lambda: last_step(tiny["run"]) >= 3 or process.poll() is not None, 90, "step 3")
        subprocess.run(lab.command("n1", "pkill", "-9", "-f", "^pdsh "), check=True)
        ours = r".*dit_ds\.train"
        until(lambda: not pids(lab, "n1", ours) and not pids(lab, "n2", ours), 60, "their end")
    finally:
        for host in ("n1", "n2"):
            subprocess.run(lab.command(host, "pkill", "-9", "-f", "dit_ds.train"))
        process.communicate(timeout=30)
