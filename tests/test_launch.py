"""The shell commands: they parse, and refuse what would go wrong in silence with one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SCRIPTS = [*sorted((REPO / "launch").glob("*.s[hb]*")), REPO / ".ci" / "run"]


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
    )


def fake(folder: Path, name: str, body: str) -> None:
    """A command `name` in `folder` that runs the shell lines `body`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    assert run("bash", "-n", script).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_content() -> None:
    checked = run("shellcheck", "--external-sources", "--severity=warning", *SCRIPTS)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num_gpus", "2"], "--config"),
        (["--config", "no-such-recipe"], "no such recipe"),
        (["--config", "quickstart", "train.step=3"], "did you mean train.steps"),
        (
            ["--config", "quickstart", "--hostfile", "no/hosts"],
            "--hostfile no/hosts cannot be read",
        ),
        (["--config", "quickstart", "--include", "elsewhere:0"], "elsewhere is not among"),
        (["--config", "quickstart", "--num_gpus", "0"], "--num_gpus 0"),
        (["--config", "quickstart", "--no_ssh"], "--no_ssh needs --node_rank"),
        (["--config", "quickstart", "--step-timeout", "0"], "--step-timeout 0"),
        (["--config", "quickstart", "--env-file", "no/file"], "--env-file no/file cannot be read"),
    ],
)
def test_train_refuses_with_one_sentence_before_anything_starts(
    tmp_path: Path, words: list[str], told: str
) -> None:
    run_dir = ["--run", str(tmp_path / "run")]
    done = run(REPO / "launch" / "train.sh", *words, *run_dir, DS_ACCELERATOR="cpu")
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_run_refuses_a_script_that_is_not_there() -> None:
    done = run(REPO / "launch" / "run.sh", "--num_gpus", "1", "tools/none.py", "--help")
    assert done.returncode == 2 and "tools/none.py does not exist" in done.stderr


def test_without_an_environment_the_remedy_is_told(tmp_path: Path) -> None:
    shutil.copytree(REPO / "launch", tmp_path / "launch")
    for name in ("bash", "dirname", "basename"):
        fake(tmp_path / "bin", name, f'exec {shutil.which(name)} "$@"')
    done = run("bash", tmp_path / "launch" / "train.sh", PATH=str(tmp_path / "bin"))
    assert done.returncode == 2 and "no Python here has dit_ds" in done.stderr


# --- the environment. A copy of the scripts, so that no .venv of the repository is touched. -------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(REPO / "launch", tmp_path / "repo" / "launch")
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(REPO / name, tmp_path / "repo")
    return tmp_path / "repo"


def use(copy: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Source env.sh from another folder and make its environment."""
    clean = {"VIRTUAL_ENV": "", "CONDA_PREFIX": "", "PYTHON": ""}
    script = f"cd / && source {copy}/launch/env.sh && use_environment test && pwd"
    return run("bash", "-c", script, **{**clean, **env})


PYTHON = """case "$*" in
  *version_info*) exit 0 ;; *find_spec*) exit 1 ;; *--version*) echo Python 3.11.9 ;;
  *"pip install"*) echo "installs $*"; {install} ;;
esac"""


def test_an_active_environment_is_used_and_installed_once(copy: Path, tmp_path: Path) -> None:
    active = tmp_path / "active"
    fake(active / "bin", "python", PYTHON.format(install="exit 0"))
    first, second = use(copy, VIRTUAL_ENV=str(active)), use(copy, VIRTUAL_ENV=str(active))
    assert "installs -m pip install -c constraints.txt -e .[test]" in first.stdout, first.stderr
    assert second.returncode == 0 and "installs" not in second.stdout
    assert second.stdout.splitlines()[-1] == str(copy)
    assert not (copy / ".venv").exists()

    with (copy / "constraints.txt").open("a") as constraints:
        constraints.write("# newer\n")
    assert "installs" in use(copy, VIRTUAL_ENV=str(active)).stdout


def test_conda_counts_unless_it_is_the_base(copy: Path, tmp_path: Path) -> None:
    fake(tmp_path / "conda" / "bin", "python", PYTHON.format(install="exit 0"))
    conda = {"CONDA_PREFIX": str(tmp_path / "conda"), "PYTHON": "/no/such/python"}
    assert "installs" in use(copy, **conda, CONDA_DEFAULT_ENV="mine").stdout
    assert "No Python" in use(copy, **conda, CONDA_DEFAULT_ENV="base").stderr


@pytest.mark.parametrize("active", [True, False])
def test_a_wrong_python_is_one_sentence(copy: Path, tmp_path: Path, active: bool) -> None:
    fake(tmp_path / "old" / "bin", "python", "exit 1")
    python = str(tmp_path / "old" / "bin" / "python")
    done = use(copy, **({"VIRTUAL_ENV": str(tmp_path / "old")} if active else {"PYTHON": python}))
    assert done.returncode == 1
    assert "3.10, 3.11 or 3.12" in done.stderr and done.stderr.count("\n") == 1


def test_a_full_disk_is_one_sentence(copy: Path, tmp_path: Path) -> None:
    active = tmp_path / "active"
    fake(active / "bin", "python", PYTHON.format(install="exit 0"))
    fake(active / "bin", "df", "printf 'header\\nfs 9 9 1048576 0%% /\\n'")
    done = use(copy, VIRTUAL_ENV=str(active))
    assert done.returncode == 1
    assert "1 GB of free disk" in done.stderr and done.stderr.count("\n") == 1


def test_a_failed_install_is_tried_again(copy: Path, tmp_path: Path) -> None:
    active = tmp_path / "active"
    fake(active / "bin", "python", PYTHON.format(install="exit 1"))
    for _ in range(2):
        done = use(copy, VIRTUAL_ENV=str(active))
        assert done.returncode == 1 and "installs" in done.stdout
        assert "pip could not install" in done.stderr and done.stderr.count("\n") == 1
