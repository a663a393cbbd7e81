"""Several hosts train and extract as one does, however they are launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.conftest import REPO, run_ranks
from tests.multinode.conftest import DEEPSPEED, start, told
from tests.multinode.lab import Lab
from tests.test_extract import data, make_images

pytestmark = pytest.mark.multinode
ODD = """a $HOME "b"; 'c' {d} & `e` \\ *"""
TRAIN, RUN = (str(REPO / "launch" / name) for name in ("train.sh", "run.sh"))
LENGTH = ["train.steps=20", "train.checkpoint_every=10"]


def of_one_host(tiny: dict[str, Any], tmp_path: Path, ds: Path) -> list[float]:
    """The curve of the same training on two ranks of one host."""
    one = tiny | {"run": tmp_path / "one-host"}
    run_ranks(2, runs.train, *runs.arguments(one, ds, *LENGTH))
    return runs.losses(one["run"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_hosts_of_a_hostfile_train_as_one_does(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
    hostfile = lab.hostfile(tmp_path / "hosts", hosts=["n1", "n2"])
    # A folder that a shell on the way would take apart.
    (tmp_path / ODD).symlink_to(tmp_path / "latents")
    settings = [*LENGTH, f"data.path={tmp_path / ODD}", "data.allow_change=true"]
    arguments = ["--hostfile", str(hostfile), *runs.arguments(tiny, ds, *settings)]
    said = told(start(lab, "n1", tmp_path, TRAIN, *arguments, "train.expect_ranks=2"))
    assert "done at step 20" in said
    assert runs.losses(tiny["run"]) == pytest.approx(of_one_host(tiny, tmp_path, ds), rel=1e-5)
    environment = (tiny["run"] / "environment.json").read_text()
    assert '"n1 cpu"' in environment and '"n2 cpu"' in environment


@pytest.mark.parametrize("supervised", [True, False])
def test_hosts_by_hand_train_as_one_does_and_one_goes_on_alone(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path, supervised: bool
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
    hostfile = lab.hostfile(tmp_path / "hosts", hosts=["n1", "n2"])
    program = [TRAIN] if supervised else [DEEPSPEED]
    common = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "n1"]
    module = [] if supervised else ["--module", "dit_ds.train"]
    words = runs.arguments(tiny, ds, "train.steps=10", *LENGTH[1:])
    hands = [
        start(lab, f"n{n + 1}", tmp_path, *program, *common, "--node_rank", str(n), *module, *words)
        for n in range(2)
    ]
    for hand in hands:
        told(hand)
    # What two hosts saved, one rank loads.
    run_ranks(1, runs.train, *runs.arguments(tiny, ds, *LENGTH))
    assert runs.losses(tiny["run"]) == pytest.approx(of_one_host(tiny, tmp_path, ds), rel=1e-5)


def test_a_single_remote_host_trains_there(lab: Lab, tiny: dict[str, Any], tmp_path: Path) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
    hostfile = lab.hostfile(tmp_path / "hosts", hosts=["n2"])
    told(start(lab, "n1", tmp_path, TRAIN, "--hostfile", str(hostfile), *runs.arguments(tiny, ds)))
    assert json.loads((tiny["run"] / "environment.json").read_text())["ranks"] == ["n2 cpu"]


def test_two_hosts_extract_and_sample_as_one_does(
    lab: Lab, vae: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    images = make_images(tmp_path / ODD, each=40)
    tool = [str(REPO / "tools" / "precompute_latents.py"), "--images", str(images), "--vae", vae]
    tool += ["--image-size", "16", "--batch-size", "3", "--samples-per-shard", "4"]
    hostfile = lab.hostfile(tmp_path / "hosts", hosts=["n1", "n2"])
    two = [RUN, "--hostfile", str(hostfile)]
    told(start(lab, "n1", tmp_path, *two, *tool, "--out", str(tmp_path / "two")))
    told(start(lab, "n3", tmp_path, sys.executable, *tool, "--out", str(tmp_path / "one")))
    assert data(tmp_path / "two") == data(tmp_path / "one")

    ds = REPO / "ds_configs" / "zero2_fp32.json"
    recipe = ["data.path=" + str(tmp_path / "one"), "train.steps=1", "train.global_batch_size=4"]
    recipe += ["model.patch_size=2", "data.lanes=2"]
    run_ranks(1, runs.train, *runs.arguments(tiny, ds, *recipe))
    tool = [str(REPO / "tools" / "sample.py"), "--run", str(tiny["run"]), "--vae", vae]
    tool += ["--classes", "0,1", "--per-class", "5", "--steps", "2", "--batch-size", "2"]
    for out, command in {"two": two, "one": [sys.executable]}.items():
        names = ["--out", str(tmp_path / f"{out}.png"), "--npz", str(tmp_path / f"{out}.npz")]
        told(start(lab, "n1", tmp_path, *command, *tool, *names))
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && host=${1#*=}; shift; done
exec ssh $host "$(printf '%q ' "$@")"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'n1\\nn2\\n'; else echo "$@" >> $(dirname $0)/asked; fi
"""


def test_a_slurm_job_saves_when_it_is_preempted_queues_again_and_goes_on(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path
) -> None:
    """With stand-ins for Slurm's two commands."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    job = ["SLURM_JOB_ID=17", "SLURM_JOB_NODELIST=n[1-2]", "SLURM_TASKS_PER_NODE=1(x2)"]
    job = ["env", f"PATH={path}", f"SLURM_SUBMIT_DIR={REPO}", *job]
    script = ["bash", str(REPO / "launch" / "slurm.sbatch")]

    def submit(*words: str) -> subprocess.Popen[str]:
        return start(lab, "n1", tmp_path, *job, *script, *runs.arguments(tiny, ds, *words))

    process = submit("train.steps=100000")
    deadline = time.monotonic() + 90
    while not (tiny["run"] / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    subprocess.run(lab.command("n1", "pkill", "-TERM", "-f", "python -m dit_ds.supervisor"))
    said = told(process)
    assert "stopped as asked" in said and "Slurm job 17 is queued again" in said
    assert (tmp_path / "bin" / "asked").read_text() == "requeue 17\n"
    step = json.loads((tiny["run"] / "done.json").read_text())["step"]
    said = told(submit(f"train.steps={step + 5}"))
    assert f"resuming at step {step} to" in said and f"done at step {step + 5}" in said
    assert '"n2 cpu"' in (tiny["run"] / "environment.json").read_text()
