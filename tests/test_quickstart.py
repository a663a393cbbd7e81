"""The README's first command, as a newcomer runs it, in a clone of this repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_reaches_its_figures_and_runs_twice(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", str(REPO), str(tmp_path / "clone")], check=True)
    # No environment is active, so it makes its own; called from another folder.
    unset = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment["PYTHON"] = sys.executable
    command = ["bash", str(tmp_path / "clone" / "launch" / "quickstart.sh")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    out = tmp_path / "clone" / "runs" / "quickstart"
    report = json.loads((out / "report.json").read_text())
    assert report["class_accuracy"] >= 0.95 and report["num_generated"] >= 500
    assert report["class_accuracy_of_reconstructions"] >= 0.97
    assert 0 < report["frechet_distance_real_halves"] < report["frechet_distance"] < 1
    assert (out / "samples.png").stat().st_size > 1000 and report["seconds"] > 60

    # Again: nothing is trained, and nothing is charged for.
    metrics = (out / "run" / "metrics.jsonl").read_bytes()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (out / "run" / "metrics.jsonl").read_bytes() == metrics
    again = json.loads((out / "report.json").read_text())
    assert abs(again.pop("seconds") - report.pop("seconds")) < 30  # the report's own few
    assert again == report
    shutil.rmtree(tmp_path / "clone")  # the environment takes gigabytes
