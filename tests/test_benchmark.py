"""The benchmarks run and say what they measure; how fast is in tools/BENCHMARKS.md."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dit_ds import benchmark
from tests.conftest import REPO, run_ranks


def test_loader_compares_all_ways_over_the_same_samples() -> None:
    found = benchmark.loader(latent_shape=(4, 4, 4), num_samples=1280, repeats=1)
    ways = ("floor", "read", "read_and_draws", "read_first_epoch", "webdataset", "file_per_sample")
    assert all(found[way] > 0 for way in ways)
    assert found["floor_over_read"] == pytest.approx(found["floor"] / found["read"])
    assert found["read_over_webdataset"] > 1 and found["read_over_file_per_sample"] > 1


def test_precompute_compares_with_the_bare_vae() -> None:
    found = benchmark.precompute(image_size=16, batch_size=4, num_images=10, repeats=1)
    assert found["ours_over_bare"] == pytest.approx(found["ours"] / found["bare"])


def test_checkpoint_compares_with_a_blocking_save_and_a_plain_write() -> None:
    sizes = {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}
    (found,) = run_ranks(1, checkpoint_of_sizes, sizes)
    assert found["bytes"] > 4 * 4 * found["parameters"] > 0
    pause, blocking = found["pause_seconds"], found["blocking_seconds"]
    assert found["pause_over_blocking"] == pytest.approx(pause / blocking)
    plain, write = found["plain_seconds"], found["write_seconds"]
    assert found["bandwidth_over_plain_write"] == pytest.approx(plain / write)


def checkpoint_of_sizes(sizes: dict[str, int]) -> dict[str, float]:
    return benchmark.checkpoint(sizes=sizes, repeats=1)


def test_the_last_line_is_json() -> None:
    command = [sys.executable, str(REPO / "tools" / "benchmark.py"), "order", "--repeats", "1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["num_samples"] == 10**9 and found["open_seconds"] > 0
