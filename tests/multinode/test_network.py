"""What is measured of a network is what it was made to be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.multinode.lab import Lab

pytestmark = pytest.mark.multinode


def test_a_slow_cable_is_measured_right_and_its_host_named(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    commands = lab.ranks(lab.names[:3], "-m", "dit_ds.network", "--out", str(out))
    with lab.shape("n3", mbit=40, ms=10):
        ranks = [
            subprocess.Popen(
                c, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for c in commands
        ]
        told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "\n".join(told)
    found = json.loads(out.read_text())
    assert found["slow_hosts"] == ["n3"] and found["slow_links"] == []
    links = {"".join(link["hosts"]): link for link in found["links"]}
    for name in ("n1n3", "n2n3"):
        # TCP's own headers and its way into a link take some of it.
        assert 0.7 * 40e6 < 8 * links[name]["bytes_per_second"] < 40e6
        # gloo asks before it sends: there, and back, and there for the next one.
        assert 0.010 < links[name]["latency_seconds"] < 0.030
    assert links["n1n2"]["bytes_per_second"] > 4 * links["n1n3"]["bytes_per_second"]
    # All that a rank on the slow cable gets of others comes through it; gloo does not fill it.
    for rate in found["bus_bytes_per_second"].values():
        assert 0.1 * 40e6 < 8 * rate < 1.05 * 40e6
    assert "slow host" in told[0]
