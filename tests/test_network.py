"""What the ranks measure of the network, and what they make of it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dit_ds import network
from dit_ds.network import Link
from tests.conftest import run_ranks


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 5, 8, 16])
def test_all_pairs_of_few_hosts_are_measured_once(num_hosts: int) -> None:
    pairs = list(itertools.chain.from_iterable(network.rounds(num_hosts)))
    assert sorted(pairs) == list(itertools.combinations(range(num_hosts), 2))


@pytest.mark.parametrize("num_hosts", [16, 17, 64, 99, 300])
def test_many_hosts_are_measured_in_few_rounds_of_disjoint_pairs(num_hosts: int) -> None:
    rounds = network.rounds(num_hosts)
    assert len(rounds) <= 4 * num_hosts.bit_length()
    for together in rounds:
        hosts = list(itertools.chain.from_iterable(together))
        assert len(hosts) == len(set(hosts))
    pairs = set(itertools.chain.from_iterable(rounds))
    assert all(tuple(sorted((i, (i + 1) % num_hosts))) in pairs for i in range(num_hosts))


def links(num_hosts: int, slow: set[str], *, names: str = "abcdefgh") -> list[Link]:
    """All pairs, at 10 units but those that are named, at 4."""
    pairs = itertools.combinations(names[:num_hosts], 2)
    return [Link((a, b), 4.0 if {a, b, a + b} & slow else 10.0, 1e-3) for a, b in pairs]


@pytest.mark.parametrize(
    ("num_hosts", "slow", "hosts", "pairs"),
    [
        (2, {"ab"}, [], []),  # nothing to compare with
        (3, set(), [], []),
        (3, {"ab"}, [], [("a", "b")]),
        (3, {"c"}, ["c"], []),
        (4, {"a"}, ["a"], []),
        (8, {"b", "de"}, ["b"], [("d", "e")]),
    ],
)
def test_a_slow_host_is_told_from_a_slow_link(
    num_hosts: int, slow: set[str], hosts: list[str], pairs: list[tuple[str, str]]
) -> None:
    assert network.slow(links(num_hosts, slow)) == (hosts, pairs)


def measure(out: Path, broken_rank: int | None = None) -> None:
    """The command in a rank that is a host of its own; the sums of one rank may be broken."""
    import torch.distributed as dist

    os.environ["LOCAL_RANK"] = "0"
    if os.environ["RANK"] == str(broken_rank):
        right = dist.all_reduce

        def wrong(values: Any, *arguments: Any, **more: Any) -> Any:
            work = right(values, *arguments, **more)
            if values.numel() > 1000:
                values[7] += 1
            return work

        dist.all_reduce = wrong  # type: ignore[assignment]
    network.main(["--out", str(out)])


def test_every_link_and_collective_of_three_hosts_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    told = run_ranks(3, measured_and_told, out)
    found = json.loads(out.read_text())
    assert found["wrong_sums"] == [] and found["ranks"] == 3 and found["links_at_once"] == 1
    named = [set(link["hosts"]) for link in found["links"]]
    assert named == [set(pair) for pair in itertools.combinations(found["hosts"], 2)]
    for link in found["links"]:
        assert 0 < link["latency_seconds"] < 1 and link["bytes_per_second"] > 1e6
    assert set(found["bus_bytes_per_second"]) == {"all_reduce", "all_gather", "reduce_scatter"}
    assert "Gbit/s, " in told[0] and told[1] == told[2] == ""


def measured_and_told(out: Path) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as told:
        measure(out)
    return told.getvalue()


def test_ranks_with_wrong_sums_are_named(tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    told = run_ranks(3, measure, out, 1, expect=1)
    (wrong,) = json.loads(out.read_text())["wrong_sums"]
    assert wrong.startswith("rank 1 on ") and wrong in told[0]


def test_a_file_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    told = run_ranks(2, measure, tmp_path / "absent" / "network.json", expect=2)
    assert "absent" in told[0] and "Traceback" not in told[0] + told[1]
