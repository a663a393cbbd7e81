"""Which machines: hostfiles, what is chosen of them, and Slurm."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dit_ds import hosts
from dit_ds.hosts import Host
from tests.conftest import REPO

THREE = [Host("a", (0, 1, 2, 3)), Host("b", (0, 1)), Host("c", (0,))]


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\n\n b slots=2 # two\na  slots = 4\n")
    assert hosts.read(tmp_path / "hosts") == [Host("b", (0, 1)), Host("a", (0, 1, 2, 3))]
    assert hosts.read(REPO / "launch" / "hosts")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("", "names no machine"),
        ("# nobody\n\n", "names no machine"),
        ("a slots=2\nb\n", "line 2: 'b' is not `HOST slots=NUMBER_OF_GPUS`"),
        ("a slots=0\n", "line 1: a has slots=0; write how many ranks it shall have"),
        ("a slots=two\n", "line 1"),
        ("-oProxyCommand=evil slots=1\n", "line 1"),
        ("a slots=2\nb slots=1\na slots=2\n", "line 3: a stands there twice"),
        (b"\xff\xfe", "not a text file"),
    ],
)
def test_a_bad_hostfile_is_named_with_its_line(
    tmp_path: Path, text: str | bytes | None, told: str
) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="--hostfile") as error:
        hosts.read(path)
    assert str(path) in str(error.value) and told in str(error.value)


def test_devices_are_chosen_as_deepspeed_does() -> None:
    assert hosts.choose(THREE) == THREE
    assert hosts.choose(THREE, include="c@a:3,1") == [Host("a", (1, 3)), Host("c", (0,))]
    assert hosts.choose(THREE, exclude="b@a:0") == [Host("a", (1, 2, 3)), Host("c", (0,))]
    assert hosts.choose(THREE, exclude="c:0") == THREE[:2]
    assert hosts.first(THREE, nodes=2, slots=1) == [Host("a", (0,)), Host("b", (0,))]


@pytest.mark.parametrize(
    ("include", "exclude", "told"),
    [
        ("a", "b", "give one of the two"),
        ("d", "", "d is not among the machines a, b, c"),
        ("b:2", "", "b has no slot 2, only 0, 1"),
        ("", "b:x", "b:x is not HOST:SLOT,SLOT"),
        ("a:", "", "a: is not HOST:SLOT,SLOT"),
        ("", "a@b@c", "leaves no device"),
    ],
)
def test_a_choice_that_is_not_there_is_refused(include: str, exclude: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        hosts.choose(THREE, include=include, exclude=exclude)


@pytest.mark.parametrize(("nodes", "slots"), [(4, None), (0, None), (2, 3), (1, 0)])
def test_more_than_there_are_is_refused(nodes: int, slots: int | None) -> None:
    with pytest.raises(ValueError, match="--num_.*; choose 1 to [1-4], or leave the option out"):
        hosts.first(THREE, nodes=nodes, slots=slots)


def test_this_machine_is_known_by_every_name() -> None:
    for name in ("localhost", "127.0.0.1", socket.gethostname()):
        assert Host(name, (0,)).here
    assert not Host("192.0.2.1", (0,)).here  # kept for documentation by RFC 5737
    assert not Host("no.such.host.invalid", (0,)).here


def test_slurm_tells_names_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\nprintf "n1\\nn2\\nn3\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    job = {"SLURM_JOB_NODELIST": "n[1-3]"}
    assert hosts.of_slurm(job | {"SLURM_GPUS_ON_NODE": "2"})[2] == Host("n3", (0, 1))
    tasks = hosts.of_slurm(job | {"SLURM_TASKS_PER_NODE": "2(x2),1"})
    assert [len(host.slots) for host in tasks] == [2, 2, 1]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="scontrol show hostnames"):
        hosts.of_slurm(job)


def test_cards_are_chosen_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert hosts.of_this_machine(None) == [Host("localhost", (0,))]
    assert hosts.of_this_machine(3) == [Host("localhost", (0, 1, 2))]
    found = hosts.of_this_machine(None, "localhost:1,3")
    assert hosts.choose(found, include="localhost:1,3") == [Host("localhost", (1, 3))]
