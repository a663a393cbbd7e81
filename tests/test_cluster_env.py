"""The environment of all hosts: read as written, and refused by file, line and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_ds.cluster_env import environment_of
from tests.conftest import REPO


def test_values_are_taken_as_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# why\n\nA=1\n  NCCL_SOCKET_IFNAME==eth0\nB=a 'b' $C; `d`\\\nEMPTY=\n")
    assert environment_of(file) == {
        "A": "1",
        "NCCL_SOCKET_IFNAME": "=eth0",
        "B": "a 'b' $C; `d`\\",
        "EMPTY": "",
    }


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("export A=1", "is not NAME=VALUE, without `export`"),
        ("A", "is not NAME=VALUE"),
        ("A = 1", "spaces around the ="),
        ("1A=1", "is not NAME=VALUE"),
        ('A="1"', "write the value without quotes"),
        ("A=1 # one", "give it its own line"),
        ("RANK=0", "its own RANK from the launcher"),
        ("GOOD=2", "GOOD is set before"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    file = tmp_path / "env"
    file.write_text(f"GOOD=1\n{line}\n")
    with pytest.raises(ValueError) as error:
        environment_of(file)
    assert sentence in str(error.value) and f"{file}, line 2: {line!r}" in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe=1\n", b"A=a\0b\n"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "env"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=str(file)):
        environment_of(file)


def test_the_shipped_file_and_each_of_its_examples_can_be_used(tmp_path: Path) -> None:
    shipped = REPO / "launch" / "cluster.env"
    environment_of(shipped)
    examples = [line[1:] for line in shipped.read_text().splitlines() if line[:1] == "#"]
    examples = [line for line in examples if line[:1].isupper() and "=" in line]
    assert len(examples) > 5
    (tmp_path / "env").write_text("\n".join(examples))
    assert len(environment_of(tmp_path / "env")) == len(examples)
