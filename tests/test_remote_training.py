"""Training from a URL is training: the same numbers, each shard fetched once for a machine."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FP32, run_ranks
from tests.runs import arguments, assert_same_bits, state_of, train, write_json
from tests.test_remote import Origin


@pytest.fixture
def origin(tiny: dict[str, Any]) -> Iterator[Origin]:
    with Origin(Path(tiny["tree"]["data"]["path"])) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


def overrides(origin: Origin, tmp_path: Path, *more: str) -> list[str]:
    return [f"data.path={origin.url}", f"data.cache={tmp_path / 'cache'}", "data.workers=1", *more]


def test_two_ranks_train_from_a_url_as_from_a_folder(
    tiny: dict[str, Any], origin: Origin, tmp_path: Path
) -> None:
    ds = write_json(tmp_path / "ds.json", FP32)
    # Ten steps of 12 are more than an epoch of 100; then a resume.
    run_ranks(2, train, *arguments(tiny, ds, "train.steps=12"))
    expected = state_of(tiny["run"], 12)
    tiny["run"] = tmp_path / "remote"
    for steps in (9, 12):
        more = overrides(origin, tmp_path, f"train.steps={steps}")
        run_ranks(2, train, *arguments(tiny, ds, *more))
    assert_same_bits(state_of(tiny["run"], 12), expected)
    shards = Counter(name for name in origin.gets if name.endswith(".tar"))
    assert shards == {f"shard-{i:06d}.tar": 1 for i in range(3)}


def test_a_shard_that_cannot_be_had_stops_all_ranks_with_its_url(
    tiny: dict[str, Any], origin: Origin, tmp_path: Path
) -> None:
    origin.faults["shard-000001.tar"] = [403] * 9
    ds = write_json(tmp_path / "ds.json", FP32)
    args = arguments(tiny, ds, *overrides(origin, tmp_path))
    outputs = run_ranks(2, train, *args, expect=2)
    assert f"error: {origin.url}/shard-000001.tar" in outputs[0] and "403" in outputs[0]


def test_a_cache_too_small_for_the_windows_is_refused_before_the_first_step(
    tiny: dict[str, Any], origin: Origin, tmp_path: Path
) -> None:
    ds = write_json(tmp_path / "ds.json", FP32)
    more = overrides(origin, tmp_path, "data.cache_gb=0.00015")
    outputs = run_ranks(2, train, *arguments(tiny, ds, *more), expect=2)
    assert "data.cache_gb=0.00015 does not hold two windows of this machine's 4 lanes" in outputs[0]
    assert "set data.cache_gb=0.1\n" in outputs[0]
    assert "Traceback" not in outputs[0]


def test_a_url_without_a_data_set_is_told(
    tiny: dict[str, Any], origin: Origin, tmp_path: Path
) -> None:
    ds = write_json(tmp_path / "ds.json", FP32)
    more = overrides(origin, tmp_path, f"data.path={origin.url}/nothing")
    (output,) = run_ranks(1, train, *arguments(tiny, ds, *more), expect=2)
    assert f"{origin.url}/nothing/manifest.json" in output and "Traceback" not in output
