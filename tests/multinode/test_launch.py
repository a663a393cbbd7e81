"""Several hosts train and extract as one does, however they are launched."""

from __future__ import annotations

import sys
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
    train = str(REPO / "launch" / "train.sh")
    # A folder that a shell on the way would take apart.
    (tmp_path / ODD).symlink_to(tmp_path / "latents")
    settings = [*LENGTH, f"data.path={tmp_path / ODD}", "data.allow_change=true"]
    arguments = ["--hostfile", str(hostfile), *runs.arguments(tiny, ds, *settings)]
    said = told(start(lab, "n1", tmp_path, train, *arguments, "train.expect_ranks=2"))
    assert "done at step 20" in said
    assert runs.losses(tiny["run"]) == pytest.approx(of_one_host(tiny, tmp_path, ds), rel=1e-5)
    environment = (tiny["run"] / "environment.json").read_text()
    assert '"n1 cpu"' in environment and '"n2 cpu"' in environment


def test_hosts_by_hand_train_as_one_does_and_one_goes_on_alone(
    lab: Lab, tiny: dict[str, Any], tmp_path: Path
) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
    hostfile = lab.hostfile(tmp_path / "hosts", hosts=["n1", "n2"])
    common = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "n1"]
    module = ["--module", "dit_ds.train", *runs.arguments(tiny, ds)]
    hands = [
        start(
            lab, f"n{node + 1}", tmp_path, DEEPSPEED, *common, "--node_rank", str(node),
            *module, "train.steps=10", *LENGTH[1:],
        )
        for node in range(2)
    ]  # fmt: skip
    for hand in hands:
        told(hand)
    # What two hosts saved, one rank loads.
    run_ranks(1, runs.train, *runs.arguments(tiny, ds, *LENGTH))
    assert runs.losses(tiny["run"]) == pytest.approx(of_one_host(tiny, tmp_path, ds), rel=1e-5)


def test_two_hosts_extract_as_one_does(lab: Lab, vae: str, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", each=40)
    tool = [str(REPO / "tools" / "precompute_latents.py"), "--images", str(images), "--vae", vae]
    tool += ["--image-size", "16", "--batch-size", "3", "--samples-per-shard", "4"]
    hostfile = lab.hostfile(tmp_path / "hosts", hosts=["n1", "n2"])
    two = [DEEPSPEED, "--hostfile", str(hostfile), *tool, "--out", str(tmp_path / "two")]
    told(start(lab, "n1", tmp_path, *two))
    told(start(lab, "n3", tmp_path, sys.executable, *tool, "--out", str(tmp_path / "one")))
    assert data(tmp_path / "two") == data(tmp_path / "one")
