"""`tools/checkpoint.py`: shows what is there, names every fault, never removes the last good."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_ds import archive, inventory, restore, retention
from dit_ds.retention import folder
from tests import runs
from tests.conftest import FP32, REPO, TINY, hear_ctrl_c, make_latents, run_ranks

TOOL = REPO / "tools" / "checkpoint.py"
STEPS = (2, 4, 6, 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks at stage 2 with checkpoints at steps 2, 4, 6 and 8, all validated."""
    place = tmp_path_factory.mktemp("trained")
    make_latents(place / "latents")
    make_latents(place / "validation", counts=(12,), first=100)
    (place / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    overrides = [f"data.path={place / 'latents'}"]
    overrides += ["train.steps=8", "train.checkpoint_every=2", "train.keep_checkpoints=9"]
    overrides += [f"validation.path={place / 'validation'}", "validation.every=2"]
    ds = runs.write_json(place / "ds.json", FP32)
    tiny = {"recipe": place / "tiny.yaml", "run": place / "run"}
    run_ranks(2, runs.train, *runs.arguments(tiny, ds, *overrides))
    return place / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """The tool in this process: what it prints, and its exit code compared."""
    spec = importlib.util.spec_from_file_location("tools_checkpoint", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments: Any, expect: int = 0) -> str:
        capsys.readouterr()
        code = 0
        try:
            module.main([str(a) for a in arguments])
        except SystemExit as e:
            code = int(e.code or 0)
        told = "".join(capsys.readouterr())
        assert code == expect, told
        return told

    before = signal.getsignal(signal.SIGPIPE)
    yield call
    signal.signal(signal.SIGPIPE, before)


def facts(told: str) -> dict[str, Any]:
    return json.loads(told.splitlines()[-1])


def at(run: Path, step: int) -> Path:
    return folder(run / "checkpoints", step)


def steps(run: Path) -> list[int]:
    """The checkpoints that are there."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def contents(run: Path) -> dict[str, bytes]:
    """All of a run but who holds it."""
    paths = [p for p in run.rglob("*") if p.name != ".lock"]
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in paths}


def alter(run: Path, step: int, part: str = "rank-00001.safetensors") -> None:
    """Flip a bit of a value, which only a checksum tells."""
    path = at(run, step) / part
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def cut(run: Path, step: int) -> None:
    path = at(run, step) / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_index(run: Path, step: int) -> None:
    (at(run, step) / "index.json").unlink()


def forge(run: Path, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change an index as a stranger can: its checksum is right again."""
    path = at(run, step) / "index.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree | {"sha256": archive.checksum(tree)}))


def say_rule(run: Path, step: int, **rule: Any) -> None:
    forge(run, step, lambda i: i["about"]["config"]["train"].update(rule))


def say_loss(run: Path, step: int, loss: float) -> None:
    forge(run, step, lambda i: i["metrics"].update({"validation/loss": loss}))


def leave_behind(run: Path) -> Path:
    """What a killed save leaves."""
    left = run / "checkpoints" / ".step-00000010.abcd-1.tmp"
    left.mkdir()
    (left / "rank-00000.safetensors").write_bytes(b"x" * 1000)
    return left


@pytest.fixture
def training(run: Path) -> Iterator[None]:
    """Another process holds the run, as a training does."""
    code = "import sys; from dit_ds import files; from pathlib import Path\n"
    code += "held = files.lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield
        process.kill()


# show


def test_show_tells_what_there_is(run: Path, tool: Callable[..., str]) -> None:
    leave_behind(run)
    (run / "checkpoints" / "notes.txt").write_text("mine")
    told = tool("show", run)
    lines = told.splitlines()
    assert [line.split()[0] for line in lines[:4]] == [f"step-0000000{n}" for n in (8, 6, 4, 2)]
    for words in ("96 images", "2 ranks, ZeRO 2, fp32", "validation/loss=", "latest", "ok"):
        assert words in lines[0]
    assert "a resume goes on from here" in lines[0] and told.count("a resume goes on") == 1
    assert "24 images" in lines[3] and "stays" in lines[3]
    assert any(".step-00000010" in line and "0.00 MB" in line for line in lines[4:])
    assert "notes.txt" in told and "keeps the newest 9" in told and "4 checkpoints" in told
    found = facts(tool("show", run, "--json"))
    first = found["checkpoints"][0]
    assert (first["step"], first["images_seen"], first["world_size"]) == (8, 96, 2)
    assert first["metrics"].keys() >= {"validation/loss", "validation_ema/loss"}
    in_all = [p.stat().st_size for p in run.glob("checkpoints/*/*")] + [len("mine")]
    assert found["num_bytes"] == sum(in_all) and found["free_bytes"] > 0
    assert found["faults"] == []


def test_show_tells_where_a_resume_goes_on(run: Path, tool: Callable[..., str]) -> None:
    (run / "checkpoints" / "latest").write_text("step-00000006\n")
    rows = facts(tool("show", run, "--json"))["checkpoints"]
    assert [r["newer"] for r in rows] == [True, False, False, False]
    assert [r["resumed"] for r in rows] == [False, True, False, False]
    assert "newer than latest: ignored" in tool("show", run).splitlines()[0]
    cut(run, 6)
    told = tool("show", run, expect=1)
    assert "FAULT: " in told.splitlines()[1] and "were written" in told.splitlines()[1]
    rows = facts(tool("show", run, "--json", expect=1))["checkpoints"]
    assert [r["resumed"] for r in rows] == [False, False, True, False]
    assert [r["latest"] for r in rows] == [False, True, False, False]
    resumed = restore.newest(run / "checkpoints")
    assert resumed is not None and resumed.step == 4
    (run / "checkpoints" / "latest").unlink()
    rows = facts(tool("show", run, "--json", expect=1))["checkpoints"]
    assert [r["resumed"] for r in rows] == [True, False, False, False]


def test_show_marks_what_the_run_keeps(run: Path, tool: Callable[..., str]) -> None:
    say_rule(run, 8, keep_checkpoints=1, keep_every=4, keep_best="validation/loss")
    for step, loss in zip(STEPS, (0.1, 0.4, 0.3, 0.2), strict=True):
        say_loss(run, step, loss)
    told = tool("show", run)
    assert "keeps the newest and every 4th step and the least validation/loss" in told
    assert ["stays" in line for line in told.splitlines()[:4]] == [True, False, True, True]


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"config": 1, "weights": "x", "precision": {}},
        {"config": {"train": []}, "weights": {"images_seen": True}, "precision": "\x1b[31m"},
        {"config": {"train": {"keep_checkpoints": -1}}, "weights": {"images_seen": 10**400}},
    ],
    ids=range(4),
)
def test_what_a_stranger_says_of_a_checkpoint_may_be_anything(
    run: Path, tool: Callable[..., str], about: dict[str, Any]
) -> None:
    forge(run, 8, lambda i: i.update(about=about))
    told = tool("show", run)
    assert "? images" in told.splitlines()[0] and "not known" in told and "\x1b" not in told
    assert "does not say how many checkpoints to keep; give --keep N" in tool(
        "prune", run, expect=2
    )
    tool("prune", run, "--keep", 1)
    assert steps(run) == [8]


def test_names_of_strangers_do_not_reach_the_terminal(run: Path, tool: Callable[..., str]) -> None:
    root = run / "checkpoints"
    (root / ".step-\x1b[2J.tmp").mkdir()
    (root / os.fsdecode(b"\xff\x1b]0;x\x07")).write_text("")
    (root / "latest").write_bytes(b"\xff\x1b[31m")
    forge(run, 6, lambda i: i.update(format="\x1b[31m", dit_ds="\x1b[32m"))
    forge(run, 4, lambda i: i.update({"\x1b[33m": 1}))
    for command, expect in (("show", 1), ("verify", 1), ("prune", 0)):
        told = tool(command, run, expect=expect)
        assert all(c.isprintable() or c == "\n" for c in told)
    assert "\x1b" not in tool("show", run / "\x1b[31m", expect=2)


# verify


def test_verify_names_every_fault(run: Path, tool: Callable[..., str]) -> None:
    assert facts(tool("verify", run, "--json"))["faults"] == []
    alter(run, 2)
    alter(run, 2, archive.MODULE)
    cut(run, 6)
    lose_index(run, 8)
    told = tool("verify", run, "--json", expect=1)
    found = facts(told)["faults"]
    assert told.count("FAULT") == len(found) == 4
    for fault, place, words in zip(
        found,
        (at(run, 8) / "index.json", at(run, 6) / "rank-00000", at(run, 2) / "m", at(run, 2) / "r"),
        ("cannot be read", "were written", "altered since", "altered since"),
        strict=True,
    ):
        assert fault.startswith(str(place)) and words in fault
    assert "step-00000004  ok" in told
    assert tool("verify", run, "--step", 4).count("\n") == 1
    tool("verify", run, "--step", 2, expect=1)
    told = tool("verify", run, "--step", 5, expect=2)
    assert "--step 5: there are checkpoints of the steps 8, 6, 4, 2" in told


def test_verify_shows_its_progress_on_a_terminal(run: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    subprocess.run([sys.executable, str(TOOL), "verify", str(run)], stderr=theirs, check=True)
    assert b"checking step-00000008:   0%" in os.read(ours, 1000)
    os.close(ours)
    os.close(theirs)


# prune


@pytest.mark.parametrize(
    ("arguments", "stay"),
    [
        ([], [2, 4, 6, 8]),  # the run's own rule: the newest 9
        (["--keep", 2], [6, 8]),
        (["--keep", 1, "--keep-every", 4], [4, 8]),
        (["--keep", 1, "--keep-best", "validation/loss"], [2, 8]),
        (["--keep-every", 4], [2, 4, 6, 8]),
    ],
    ids=str,
)
def test_prune_keeps_what_the_rule_names(
    run: Path, tool: Callable[..., str], arguments: list[Any], stay: list[int]
) -> None:
    for step in STEPS:
        say_loss(run, step, step / 9)
    sizes = {s: sum(p.stat().st_size for p in at(run, s).iterdir()) for s in STEPS}
    before = contents(run)
    planned = facts(tool("prune", run, *arguments, "--dry-run", "--json"))
    assert contents(run) == before
    told = tool("prune", run, *arguments, "--json")
    assert steps(run) == stay
    gone = [s for s in reversed(STEPS) if s not in stay]
    assert facts(told) == planned | {"dry_run": False, "free_bytes": facts(told)["free_bytes"]}
    assert facts(told)["removed"] == [at(run, s).name for s in gone]
    assert facts(told)["freed_bytes"] == sum(sizes[s] for s in gone)
    assert told.count("not kept by the rule") == len(gone)
    tool("prune", run, *arguments)
    assert steps(run) == stay


def test_prune_goes_by_the_rule_of_the_newest_good_checkpoint(
    run: Path, tool: Callable[..., str]
) -> None:
    say_rule(run, 8, keep_checkpoints=1)
    say_rule(run, 6, keep_checkpoints=2)
    alter(run, 8)
    tool("prune", run)
    assert steps(run) == [4, 6]


@pytest.mark.parametrize("damage", [alter, cut, lose_index])
@pytest.mark.parametrize("damaged", [(8,), (6,), (2,), (8, 6), (8, 4), (6, 4, 2), (8, 6, 4)])
def test_damaged_ones_do_not_count_and_go(
    run: Path,
    tool: Callable[..., str],
    damage: Callable[[Path, int], None],
    damaged: tuple[int, ...],
) -> None:
    for step in damaged:
        damage(run, step)
    good = [s for s in STEPS if s not in damaged]
    told = tool("prune", run, "--keep", 2)
    # Of those that go anyway, nobody reads the bytes.
    assert steps(run) == good[-2:]
    if good[-2:][0] < damaged[0]:
        fault = next(line for line in told.splitlines() if f"-0000000{damaged[0]}" in line)
        assert "damaged: " in fault and "removed" in fault
    resumed = restore.newest(run / "checkpoints")
    assert resumed is not None and resumed.step == good[-1]


def test_nothing_goes_where_nothing_is_whole(run: Path, tool: Callable[..., str]) -> None:
    leave_behind(run)
    for step, damage in zip(STEPS, (alter, cut, lose_index, alter), strict=True):
        damage(run, step)
    before = contents(run)
    told = tool("prune", run, "--keep", 1, "--json", expect=1)
    assert contents(run) == before and "nothing was removed" in told
    assert len(facts(told)["left"]) == 5 and facts(told)["removed"] == []


def test_the_one_that_latest_names_stays(run: Path, tool: Callable[..., str]) -> None:
    (run / "checkpoints" / "latest").write_text("step-00000004\n")
    told = tool("prune", run, "--keep", 1, "--dry-run")
    assert told.count("newer than what latest names") == 2
    tool("prune", run, "--keep", 1)
    assert steps(run) == [4]


def test_newer_ones_stay_where_the_one_that_latest_names_is_damaged(
    run: Path, tool: Callable[..., str]
) -> None:
    (run / "checkpoints" / "latest").write_text("step-00000004\n")
    alter(run, 4)
    tool("prune", run, "--keep", 1)
    assert steps(run) == [2, 6, 8]


def test_nothing_of_a_training_is_touched(
    run: Path, tool: Callable[..., str], training: None
) -> None:
    left = leave_behind(run)
    (run / "checkpoints" / "latest").write_text("step-00000006\n")
    told = tool("prune", run, "--keep", 1)
    # Step 8 may have been renamed just now, and `latest` is still to come.
    assert steps(run) == [6, 8] and left.is_dir() and told.count("left ") == 2


def test_leftovers_go_where_nobody_trains(run: Path, tool: Callable[..., str]) -> None:
    left = leave_behind(run)
    (run / "checkpoints" / ".step-00000011.tmp").symlink_to(run)
    (run / "checkpoints" / ".step-00000012.tmp").write_text("a file")
    assert left.name in tool("prune", run, "--dry-run") and left.is_dir()
    tool("prune", run / "checkpoints")
    assert not list(run.glob("checkpoints/.*")) and steps(run) == list(STEPS)
    leave_behind(run)
    (run / ".lock").unlink()  # then nobody knows
    assert "left " in tool("prune", run) and left.is_dir() and not (run / ".lock").exists()


def test_a_checkpoint_of_another_version_is_not_damaged(
    run: Path, tool: Callable[..., str]
) -> None:
    forge(run, 8, lambda i: i.update(format=99))
    told = tool("prune", run, "--keep", 1)
    assert steps(run) == [6, 8] and "format 99" in told
    tool("verify", run, expect=1)


def test_what_others_remove_meanwhile_is_no_fault(run: Path) -> None:
    lose_index(run, 4)
    cut(run, 6)

    def prune(_: int) -> None:
        plan = inventory.plan(run / "checkpoints", {"last": 1}, alone=False)
        for path in plan.remove:
            retention.remove(path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(prune, range(32)))
    assert steps(run) == [8] and not retention.leftovers(run / "checkpoints")


def commit_again(run: Path, step: int) -> None:
    """A checkpoint like another one takes its place, as when a training went back."""
    aside = run / "checkpoints" / ".step-x.tmp"
    shutil.copytree(at(run, step), aside)
    (aside / "index.json.tmp").write_bytes((aside / "index.json").read_bytes())
    (aside / "index.json.tmp").rename(aside / "index.json")
    retention.remove(at(run, step))
    aside.rename(at(run, step))


def test_what_was_saved_again_since_it_was_looked_at_stays(run: Path) -> None:
    plan = inventory.plan(run / "checkpoints", {"last": 1}, alone=False)
    commit_again(run, 4)
    retention.remove(at(run, 6))
    assert inventory.carry_out(run / "checkpoints", plan) == (
        {at(run, 4): "saved again meanwhile"},
        {},
    )
    assert steps(run) == [4, 8]


def test_what_is_saved_in_the_moment_of_its_removal_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looked_at = retention.identity, retention.identity(at(run, 4))

    def look_and_wait(path: Path) -> retention.Identity:
        found = look(path)
        if found == looked_at:
            commit_again(run, 4)
        return found

    monkeypatch.setattr(retention, "identity", look_and_wait)
    assert not retention.remove(at(run, 4), only=looked_at)
    assert steps(run) == list(STEPS) and not retention.leftovers(run / "checkpoints")
    assert not list(archive.Checkpoint.open(at(run, 4)).faults())


def test_what_latest_names_when_it_would_go_stays(run: Path) -> None:
    plan = inventory.plan(run / "checkpoints", {"last": 1}, alone=False)
    (run / "checkpoints" / "latest").write_text("step-00000002\n")
    left, _ = inventory.carry_out(run / "checkpoints", plan)
    assert left == {at(run, 2): "what latest names now"} and steps(run) == [2, 8]


def test_a_removal_that_fails_hides_no_other(
    run: Path, tool: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def failing(path: Path) -> None:
        if "step-00000004" in path.name:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", failing)
    told = tool("prune", run, "--keep", 1, "--json", expect=1)
    assert steps(run) == [8] and len(retention.leftovers(run / "checkpoints")) == 1
    assert facts(told)["removed"] == ["step-00000006", "step-00000002"]
    (fault,) = facts(told)["faults"]
    assert fault.startswith(f"{at(run, 4)} could not be removed: ") and "not permitted" in fault
    assert f"FAULT: {fault}" in told and told.count("removed  step-") == 2


# command line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "nowhere"], "nowhere: no such folder"),
        (["verify", "."], "there are no checkpoints in"),
        (["prune", "run", "--keep", "0"], "--keep 0: at least 1 stays"),
        (["prune", "run", "--keep-every", "-1"], "--keep-every -1: give a number"),
        (["prune", "run", "--keep-best", "fid"], "--keep-best fid: was measured at no checkpoint"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(
    run: Path,
    tool: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(run.parent)
    told = tool(*arguments, expect=2)
    assert sentence in told and told.startswith("error: ") and told.count("\n") == 1
    assert steps(run) == list(STEPS)


def test_the_command_starts_without_deepspeed() -> None:
    code = f"import runpy, sys; runpy.run_path({str(TOOL)!r})\n"
    code += "assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def no_file_grows() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_the_command_prunes_on_a_full_disk_while_a_training_runs(run: Path, training: None) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "prune", "run", "--keep", "2", "--json"],
        cwd=run.parent,
        preexec_fn=no_file_grows,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and not done.stderr  # no progress bar where there is no terminal
    assert facts(done.stdout)["stay"] == ["step-00000008", "step-00000006"]
    assert steps(run) == [6, 8]


def test_ctrl_c_does_not_wait_for_the_rest(run: Path) -> None:
    # 256 GB of nothing, more than the memory, which take no room and minutes to read.
    num_bytes, zeros = 1 << 38, hashlib.sha256(bytes(archive.CHUNK_BYTES)).hexdigest()
    header = {"x": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    text = json.dumps(header).encode()
    path = at(run, 6) / archive.MODULE
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + num_bytes)
    size = path.stat().st_size
    entry = {"num_bytes": size, "sha256": [zeros] * -(-size // archive.CHUNK_BYTES)}
    forge(run, 6, lambda i: i["files"][archive.MODULE].update(entry))
    command = [sys.executable, str(TOOL), "verify", str(run)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, preexec_fn=hear_ctrl_c) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"step-00000008  ok")
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == b"interrupted\n"
        assert process.returncode == 130 and time.monotonic() - began < 5


def test_what_a_first_save_left_can_be_seen_and_goes(run: Path, tool: Callable[..., str]) -> None:
    leave_behind(run)
    for path in retention.committed(run / "checkpoints"):
        retention.remove(path)
    assert "left by a killed one" in tool("show", run)
    assert "freed" in tool("prune", run)
    assert not retention.leftovers(run / "checkpoints")


def test_prune_goes_to_its_end_though_nobody_reads_on(run: Path) -> None:
    command = f"{sys.executable} {TOOL} prune {run} --keep 1 | head -n 1"
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=60)
    assert steps(run) == [8]
