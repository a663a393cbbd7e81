"""Under Slurm: `srun` starts ranks without a launcher, and a stopped job queues again.

There is no Slurm here: `srun` and `scontrol` are stand-ins, and what they are asked is looked at.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_ds import console, supervisor

JOB = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]"}
JOB |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}


def stand_in(folder: Path, name: str, script: str) -> None:
    """A command `name`."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def test_ranks_of_srun_find_each_other(tmp_path: Path) -> None:
    stand_in(
        tmp_path, "scontrol", '[[ $* == "show hostnames n[1-2]" ]] && printf "127.0.0.1\\nn2\\n"'
    )
    code = "from dit_ds import distributed as d; import os; assert d.launched(); d.init()\n"
    code += "print(d.gather_json([d.rank(), d.local_rank(), os.environ['MASTER_PORT']]))"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
            | JOB
            | {"SLURM_PROCID": str(rank), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    port = 20000 + 31 * 4711 % 10000
    for process in ranks:
        out, _ = process.communicate(timeout=120)
        assert out.splitlines()[-1] == str([[0, 0, str(port)], [1, 0, str(port)]])


def test_a_stopped_job_queues_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, "scontrol", 'echo "$@" >> $(dirname $0)/asked; [[ $2 == 4711 ]]')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    supervisor.requeue()  # no job
    assert not (tmp_path / "asked").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    supervisor.requeue()
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    console.flush()
    assert "Slurm job 4711 is queued again" in capfd.readouterr().out
