"""The README's table of ways to launch, each command as it stands there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.conftest import REPO, make_latents
from tests.multinode.conftest import start, told
from tests.multinode.lab import Lab
from tests.multinode.test_launch import SCONTROL, SRUN

pytestmark = pytest.mark.multinode
SHORT = "optimizer.warmup_steps=2 train.steps=3 train.global_batch_size=4 preview.every=0"
STAND_INS = {
    "srun": SRUN,
    "scontrol": SCONTROL,
    "sbatch": """#!/bin/bash
shift 2
export SLURM_JOB_ID=3 SLURM_JOB_NODELIST='n[1-2]' SLURM_TASKS_PER_NODE='1(x2)' SLURM_SUBMIT_DIR=$PWD
exec bash "$@"
""",
}


def commands() -> dict[str, str]:
    """The table's rows: where, and the first command."""
    text = (REPO / "README.md").read_text()
    table = text[text.index("| where | command |") :].split("\n\n")[0]
    rows = [re.match(r"\| ([^|]+) \| [^`]*`([^`]+)`", line) for line in table.splitlines()[2:]]
    return {row[1]: row[2] for row in rows if row}


RANKS = {
    "one card": ["n1"],
    "several cards of one machine": ["n1", "n1"],
    "chosen cards": ["n1", "n1"],
    "machines of a hostfile": ["n1", "n2"],
    "machines by hand, without ssh": ["n1", "n2"],
    "a Slurm job": ["n1", "n2"],
    "DeepSpeed's own launcher": ["n1", "n2"],
}


def test_every_way_is_tried() -> None:
    assert [*RANKS, "the tools"] == list(commands())


@pytest.mark.parametrize("where", RANKS)
def test_a_way_to_launch_trains_as_written(lab: Lab, tmp_path: Path, where: str) -> None:
    make_latents(tmp_path / "runs" / "quickstart" / "latents")
    (tmp_path / "launch").mkdir()
    (tmp_path / "bin").mkdir()
    for path in (REPO / "launch").iterdir():
        if path.name != "hosts":
            (tmp_path / "launch" / path.name).symlink_to(path)
    lab.hostfile(tmp_path / "launch" / "hosts", ["n1", "n2"])
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    command = f"{commands()[where]} {SHORT}"
    by_hand = "N " in command
    programs = f"PATH={tmp_path / 'bin'}:{os.environ['PATH']}"
    hands = [
        start(
            lab, f"n{n + 1}", tmp_path, "env", programs, "bash", "-c",
            command.replace("--node_rank N", f"--node_rank {n}").replace("FIRST_HOST", "n1"),
        )
        for n in range(1 + by_hand)
    ]  # fmt: skip
    for hand in hands:
        told(hand)
    (run,) = [path for path in (tmp_path / "runs").iterdir() if (path / "done.json").exists()]
    assert json.loads((run / "done.json").read_text())["step"] == 3
    ranks = json.loads((run / "environment.json").read_text())["ranks"]
    assert ranks == [f"{name} cpu" for name in RANKS[where]]
