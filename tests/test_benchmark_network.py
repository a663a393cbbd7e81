"""What a step sends is counted, and is what ds_configs/README.md says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dit_ds import benchmark_network
from tests.conftest import REPO, run_ranks


@pytest.mark.parametrize(
    ("stage", "micro_steps", "wanted"),
    [(0, 1, 8), (0, 4, 8), (1, 1, 6), (1, 4, 6), (2, 1, 6), (2, 4, 18), (3, 1, 8), (3, 4, 32)],
)
def test_the_formula_of_the_paper(stage: int, micro_steps: int, wanted: int) -> None:
    assert benchmark_network.formula(stage, micro_steps) == wanted


def test_a_step_sends_what_the_page_says() -> None:
    wanted = {
        ("zero0", 2): 8,
        ("zero1", 2): 10,
        ("zero2", 2): 18,
        ("zero2_reduce", 2): 10,
        ("zero3", 1): 6,
        ("zero3_let_go", 1): 8,
    }
    told = run_ranks(2, volumes, list(wanted))
    # Stage 3 keeps biases and gathers them once, and some weights from one use to the next.
    assert told[0] == pytest.approx(list(wanted.values()), rel=0.02)
    assert told[0] == told[1]


def volumes(ways: list[tuple[str, int]]) -> list[float]:
    from dit_ds import distributed

    distributed.init()
    return [benchmark_network.volume(benchmark_network.WAYS[w], micro_steps=k) for w, k in ways]


def test_one_rank_is_told_how_to_start_more() -> None:
    command = [sys.executable, str(REPO / "tools" / "benchmark.py"), "network"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "launch/run.sh --num_gpus 2" in done.stderr
    assert "Traceback" not in done.stderr
