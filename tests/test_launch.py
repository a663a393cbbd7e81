"""The shell commands: they parse, and refuse what would go wrong in silence with one sentence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dit_ds import launched

REPO = Path(__file__).parents[1]
SCRIPTS = [*sorted((REPO / "launch").glob("*.sh")), REPO / ".ci" / "run"]


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


@pytest.fixture
def echoing(tmp_path: Path) -> dict[str, str]:
    """An environment whose `deepspeed` prints its arguments, one line each."""
    fake(tmp_path / "bin", "deepspeed", 'printf "%s\\n" "$@"')
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def test_train_puts_the_module_between_its_options_and_deepspeeds(
    echoing: dict[str, str],
) -> None:
    done = run(
        REPO / "launch" / "train.sh",
        *("--hostfile", REPO / "launch" / "hosts", "--include", "localhost:0"),
        *("--config", "a recipe", "train.steps=2"),
        **echoing,
    )
    assert done.returncode == 0, done.stderr
    assert launched.arguments(done.stdout.splitlines()) == [
        *("--no_ssh_check", "--master_addr", "127.0.0.1"),  # this machine is not asked by ssh
        *("--hostfile", str(REPO / "launch" / "hosts"), "--include", "localhost:0"),
        *("--module", "dit_ds.train", "--config", "a recipe", "train.steps=2"),
    ]


@pytest.mark.parametrize(
    "spelling", ["--hostfile {}", "--hostfile={}", "-H {}", "-H{}", "--host {}"]
)
@pytest.mark.parametrize("text", [None, "", "# nobody\n\n", "elsewhere slots=8\n"])
def test_train_refuses_hostfiles_that_would_train_here_in_silence(
    echoing: dict[str, str], tmp_path: Path, spelling: str, text: str | None
) -> None:
    hosts = tmp_path / "hosts"
    if text is not None:
        hosts.write_text(text)
    words = spelling.format(hosts).split()
    done = run(REPO / "launch" / "train.sh", *words, "--config", "quickstart", **echoing)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(hosts) in done.stderr and done.stderr.count("\n") == 1


def test_train_takes_several_machines_and_one_that_is_meant(
    echoing: dict[str, str], tmp_path: Path
) -> None:
    train, hosts = REPO / "launch" / "train.sh", tmp_path / "hosts"
    hosts.write_text("# two\nnode1 slots=8\nnode2 slots=8\n")
    assert run(train, "-H", hosts, "--config", "x", **echoing).returncode == 0
    hosts.write_text("node1 slots=8\n")
    assert run(train, "-H", hosts, "--force_multi", "--config", "x", **echoing).returncode == 0


def test_train_without_a_recipe_says_so(echoing: dict[str, str]) -> None:
    done = run(REPO / "launch" / "train.sh", "--num_gpus", "2", **echoing)
    assert done.returncode == 2 and "--config is missing" in done.stderr


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


def test_words_come_through_a_shell_as_they_were() -> None:
    words = ["data.path=/a b", "", "base64:x", "ä='\"$HOME`;\\\n", "--config", "x=[1, 2]", "a=b"]
    script = (REPO / "launch" / "train.sh").read_text()
    encode = script[script.index("encode()") : script.index("is_here()")]
    sent = [
        subprocess.run(
            ["bash", "-c", encode + 'encode "$1"', "bash", word],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for word in words
    ]
    assert all(re.fullmatch(r"[\w./=:,+@%-]+", word, re.ASCII) for word in sent)
    assert sent[4] == "--config" and sent[-1] == "a=b"  # what is plain stays readable
    assert launched.arguments(sent) == words
    with pytest.raises(ValueError, match="base64:%%% cannot be decoded"):
        launched.arguments(["base64:%%%"])
