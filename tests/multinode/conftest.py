"""Hosts for the tests of this folder; where none can be made, they skip with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.multinode.lab import Lab, why_not
from tests.test_extract import vae  # noqa: F401 - a fixture

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts, n1 to n3."""
    if reason := why_not():
        pytest.skip(f"no hosts can be made here: {reason}")
    with Lab(tmp_path_factory.mktemp("hosts") / "lab", 3) as hosts:
        yield hosts


def start(lab: Lab, host: str, folder: Path, *command: str, **more: Any) -> subprocess.Popen[str]:
    """A command on a host, in a folder whose `.deepspeed_env` holds for all hosts."""
    everywhere = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    lines = [f"{name}={value}\n" for name, value in everywhere.items()]
    (folder / ".deepspeed_env").write_text("".join(lines))
    return subprocess.Popen(
        ["env", "-C", str(folder), *lab.command(host, *command)],
        env=os.environ | everywhere,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def told(process: subprocess.Popen[str], *, expect: int = 0, timeout: float = 240) -> str:
    """What a command prints, to its end."""
    text, _ = process.communicate(timeout=timeout)
    assert process.returncode == expect, text
    return text
