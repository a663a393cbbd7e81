"""What hosts answer is compared: who differs is named, with a remedy. Faults of real hosts:
tests/multinode/test_preflight.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dit_ds import comparison, facts
from dit_ds.comparison import Fault
from dit_ds.preflight import Report
from tests.conftest import REPO, make_latents

SLOTS = {name: (0, 1) for name in ("a", "b", "c")}


def answers(**different: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of the hosts a, b and c, which are alike but for what is given."""
    alike = {
        "boot": "1",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "commit": "c0",
        "code": "0" * 64,
        "interfaces": ["lo", "eth0", "ib0"],
        "num_gpus": 2,
        "driver": "550.54",
        "gpu_error": None,
    }
    return {name: alike | {"hostname": name} | different.get(name, {}) for name in SLOTS}


def told(faults: list[Fault]) -> list[str]:
    assert all(fault.remedy for fault in faults)
    return [f"{fault.host} {fault.what}" for fault in faults]


def test_hosts_that_are_alike_have_no_fault() -> None:
    assert comparison.faults(answers(), SLOTS) == comparison.notes(answers()) == []
    assert comparison.faults({}, {}) == comparison.notes({}) == comparison.clocks({}) == []
    # On CPUs there may be any number of ranks.
    none = {name: {"num_gpus": 0, "driver": None} for name in SLOTS}
    assert comparison.faults(answers(**none), SLOTS) == []
    assert len(comparison.no_gpus(answers(**none))) == 3 and not comparison.no_gpus(answers())


@pytest.mark.parametrize(
    "different, expected",
    [
        ({"python": "3.10.2"}, ["has Python 3.10, the others 3.11"]),
        (
            {"packages": {"torch": None, "deepspeed": "0.19.8"}},
            ["has torch not at all, the others 2.13.0"],
        ),
        ({"code": "1" * 64}, ["has another dit_ds: other changes to c0, the others c0"]),
        ({"code": "1" * 64, "commit": "c1"}, ["has another dit_ds: c1, the others c0"]),
        (
            {"code": "1" * 64, "commit": None},
            ["has another dit_ds: code 111111111111, the others c0"],
        ),
        ({"commit": "c1"}, ["is at commit c1, the others at c0"]),
        ({"commit": None}, []),
        ({"driver": "535.1"}, ["has the GPU driver 535.1, the others 550"]),
        ({"num_gpus": 1}, ["has 1 GPUs, and the slots asked for go up to GPU 1"]),
        (
            {"num_gpus": 0, "driver": None},
            ["has 0 GPUs, and the slots asked for go up to GPU 1"],
        ),
        (
            {"num_gpus": 0, "driver": None, "gpu_error": "version mismatch"},
            ["nvidia-smi fails: version mismatch"],
        ),
        ({"hostname": "a"}, ["is the same machine as a"]),
    ],
)
def test_the_host_that_differs_is_named(different: dict[str, Any], expected: list[str]) -> None:
    found = comparison.faults(answers(b=different), SLOTS)
    assert told(found) == [f"b {what}" for what in expected]


def test_most_hosts_are_right_and_the_first_among_equals() -> None:
    old = {"packages": {"torch": "2.9.0", "deepspeed": "0.19.8"}}
    assert [f.host for f in comparison.faults(answers(a=old), SLOTS)] == ["a"]
    two = {name: a for name, a in answers(a=old).items() if name != "c"}
    assert told(comparison.faults(two, SLOTS)) == ["b has torch 2.13.0, the others 2.9.0"]


def test_small_differences_are_notes() -> None:
    different = answers(b={"python": "3.11.9"}, c={"driver": "550.90"})
    assert comparison.faults(different, SLOTS) == []
    assert told(comparison.notes(different)) == [
        "b has Python 3.11.9, the others 3.11.7",
        "c has the GPU driver 550.90, the others 550.54",
    ]


def test_the_clock_that_is_off_is_named() -> None:
    # All may be ahead of the machine that asks.
    assert comparison.clocks({"a": 60.0, "b": 61.0, "c": 59.0}) == []
    assert told(comparison.clocks({"a": -100.0, "b": 0.1, "c": 0.0})) == [
        "a its clock is 100 s behind"
    ]


@pytest.mark.parametrize(
    "setting, faulty",
    [
        ("GLOO_SOCKET_IFNAME=eth0", []),
        ("GLOO_SOCKET_IFNAME=eth0,ib0", ["b"]),
        ("NCCL_SOCKET_IFNAME=eth1,ib0", ["b"]),
        ("NCCL_SOCKET_IFNAME=ib", ["b"]),
        ("NCCL_SOCKET_IFNAME==eth0,ib0", []),
        ("NCCL_SOCKET_IFNAME==ib", ["a", "b", "c"]),
        ("NCCL_SOCKET_IFNAME=^docker", []),
        ("GLOO_SOCKET_IFNAME=", []),
    ],
)
def test_hosts_without_the_chosen_interface_are_named(setting: str, faulty: list[str]) -> None:
    name, _, value = setting.partition("=")
    found = comparison.interfaces(answers(b={"interfaces": ["lo", "eth0"]}), {name: value})
    assert [f.host for f in found] == faulty and all(value in f.what for f in found)


def test_storage_that_lacks_something_is_named() -> None:
    good = {
        "folder": "/runs",
        "mark_error": None,
        "free_bytes": 5e9,
        "data": {"/d": {"sha256": "0", "error": None}},
    }
    stored: dict[str, dict[str, Any]] = {
        "a": good | {"data": {"/d": {"sha256": None, "error": "No such file"}}},
        "b": good | {"mark_error": "Permission denied"},
        "c": good | {"free_bytes": 0.5e9, "data": {"/d": {"sha256": "1", "error": None}}},
    }
    found = comparison.storage(stored, "/runs/r", {"data.path": "/d"}, disk_bytes=1e9)
    assert told(found) == [
        "b /runs cannot be written (Permission denied)",
        "c /runs has 0.5 GB of free disk",
        "a data.path=/d: manifest.json cannot be read (No such file)",
        "c data.path=/d: manifest.json is another than the others'",
    ]


def test_the_host_with_another_run_folder_is_named() -> None:
    marks = {"a": "ma", "b": "mb", "c": "mc"}
    all_seen = ["ma", "mb", "mc"]
    assert comparison.not_shared(marks, dict.fromkeys(marks, all_seen), "/r") == []
    # The first one is alone.
    alone = {"a": ["ma"], "b": ["mb", "mc"], "c": ["mb", "mc"]}
    assert [f.host for f in comparison.not_shared(marks, alone, "/r")] == ["a"]
    # What c writes stays there, but it sees what others write.
    half = {"a": ["ma", "mb"], "b": ["ma", "mb"], "c": all_seen}
    assert [f.host for f in comparison.not_shared(marks, half, "/r")] == ["c"]


def test_what_ranks_measured_names_hosts_as_the_hostfile_does() -> None:
    def link(a: str, b: str, rate: float) -> dict[str, Any]:
        return {"hosts": [a, b], "bytes_per_second": rate, "latency_seconds": 1e-4}

    names = {"node-a": "a", "node-b": "b", "node-c": "c"}
    right: dict[str, Any] = {"wrong_sums": [], "slow_hosts": [], "slow_links": []}
    links = [link("node-a", "node-b", 1.25e9), link("node-a", "node-c", 1.25e9)]
    slow_link = right | {"links": [*links, link("node-b", "node-c", 1.25e7)]}
    slow_link["slow_links"] = [["node-b", "node-c"]]
    assert told(comparison.network(slow_link, names)) == [
        "b the link to c is slow: 0.1 Gbit/s, 10 Gbit/s are usual"
    ]
    slow_host = slow_link | {"slow_links": [], "slow_hosts": ["node-c (rank 4)"]}
    slow_host["links"] = [link("node-a", "node-c (rank 4)", 1.25e7), *links]
    assert told(comparison.network(slow_host, names)) == [
        "c its network is slow: 0.1 Gbit/s at best, 10 Gbit/s are usual"
    ]
    wrong = right | {"wrong_sums": ["rank 3 on node-b"]}
    assert told(comparison.network(wrong, names)) == ["b rank 3 got wrong sums in an all-reduce"]


def test_what_hosts_say_cannot_steer_the_terminal() -> None:
    report = Report([], faults=[Fault("a", "nvidia-smi fails: \x1b[2J", "r"), Fault("b", "x", "r")])
    shown = report.table()
    assert "\x1b" not in shown and "FAULT a: nvidia-smi fails: \\x1b[2J\n    r\nFAULT b: x" in shown


def test_another_program_on_the_port_is_not_taken_for_the_host() -> None:
    port = facts.listen(0, "mine")
    assert facts.reach("127.0.0.1", port, "mine")
    with pytest.raises(OSError, match="in use"):
        facts.listen(port, "other")
    with pytest.raises(ConnectionError, match="another program"):
        facts.reach("127.0.0.1", port, "else")
    facts.forget("mine")
    deadline = time.monotonic() + 10
    while True:  # the ranks get the port
        try:
            facts.listen(port, "again")
            break
        except OSError:
            assert time.monotonic() < deadline
    facts.forget("again")


def tool(*words: str, expect: int) -> str:
    command = [sys.executable, str(REPO / "tools" / "preflight.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    make_latents(tmp_path / "latents")
    words = ["--run", str(tmp_path / "runs" / "new"), "--data", str(tmp_path / "latents")]
    text = tool(*words, "--quick", "--json", expect=0)
    *shown, last = text.splitlines()
    found = json.loads(last)
    assert shown[-2:] == ["not looked at: the network", "1 hosts, 1 ranks: 0 faults"]
    assert found["faults"] == [] and found["hosts"][0]["python"] in shown[1]
    assert os.listdir(tmp_path) == ["latents"]  # nothing is left
    text = tool(*words, "--disk-gb", "1e9", "--data", str(tmp_path), expect=1)
    assert "GB of free disk" in text and f"data.path={tmp_path}: manifest.json" in text
    assert "the network, before the faults are mended" in text


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--hostfile", "/none"], "--hostfile /none cannot be read"),
        (["--config", "none"], "--config none: no such recipe"),
        (["train.steps=3"], "train.steps=3 is a setting of a recipe; name it with --config"),
        (["--env-file", "/none"], "--env-file /none cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str) -> None:
    text = tool(*words, expect=2)
    assert text.startswith(f"error: {sentence}") and len(text.splitlines()) == 1
