"""What goes wrong in the middle of a run ends it in good order, with what was reached kept."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_ds import distributed, launched
from dit_ds.manifest import Manifest
from dit_ds.order import Order
from dit_ds.shards import ShardWriter
from tests import runs
from tests.conftest import REPO, make_latents, run_ranks

FP32 = REPO / "ds_configs" / "zero2_fp32.json"


def later_shard(tiny: dict[str, Any]) -> Path:
    """A shard that is first read some steps after the start, of a data set with many."""
    folder = Path(tiny["tree"]["data"]["path"])
    manifest = make_latents(folder, counts=(12,) * 6)
    order = Order([12] * 6, global_batch=12, lanes=1, window=1, seed=0)
    return folder / manifest.shards[order.batch(3)[1][0] // 12].name


# One shard at a time, so that the data is opened little by little.
SLOWLY = ["data.lanes=1", "data.window=1", "train.checkpoint_every=100", "train.steps=7"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_found_damaged_in_mid_run_is_named_and_costs_no_step(
    tiny: dict[str, Any], workers: int
) -> None:
    shard = later_shard(tiny)
    good = shard.read_bytes()
    shard.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    arguments = runs.arguments(tiny, FP32, f"data.workers={workers}", *SLOWLY)
    told = run_ranks(2, runs.train, *arguments, expect=2)
    assert told[0].count(shard.name) == 1 and "Traceback" not in told[0]
    reached = runs.metrics(tiny["run"])[-1]["step"]
    assert 1 <= reached < 7
    assert (tiny["run"] / "checkpoints/latest").read_text() == f"step-{reached:08d}\n"
    shard.write_bytes(good)
    run_ranks(2, runs.train, *arguments)
    mended = runs.losses(tiny["run"])
    tiny["run"] = tiny["run"].with_name("undisturbed")
    run_ranks(2, runs.train, *runs.arguments(tiny, FP32, *SLOWLY))
    assert mended == runs.losses(tiny["run"])


def test_a_latent_that_is_not_finite_is_named_by_file_and_key(tiny: dict[str, Any]) -> None:
    folder = Path(tiny["tree"]["data"]["path"])
    manifest = Manifest.load(folder)
    moments = np.ones((2, 8, 4, 4), np.float16)
    with ShardWriter(folder / "shard-000002.tar") as writer:
        for i in range(20):
            moments[1, 3, 2, 1] = np.nan if i == 13 else 1.0
            writer.add(f"{80 + i:09d}", moments, 0)
    shards = (*manifest.shards[:2], writer.info)
    manifest.model_copy(update={"shards": shards}).save(folder)
    told = run_ranks(2, runs.train, *runs.arguments(tiny, FP32), expect=2)
    assert "shard-000002.tar" in told[0] and "000000093" in told[0]


def train_elsewhere_on_rank_1(*arguments: str) -> None:
    """Train with what comes after `--` as well, on the second rank."""
    here, there = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    runs.train(*here, *(there if os.environ["RANK"] == "1" else ()))


def test_ranks_that_see_other_settings_or_data_are_refused(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    here = Path(tiny["tree"]["data"]["path"])
    make_latents(tmp_path / "there", first=500)
    arguments = runs.arguments(tiny, FP32)
    told = run_ranks(2, train_elsewhere_on_rank_1, *arguments, "--", "optimizer.lr=1", expect=2)
    assert "the ranks differ in the settings: " in told[0] and "(rank 1 on " in told[0]
    # The same path, but another folder on each host.
    (tmp_path / "1").symlink_to(tmp_path / "there")
    (tmp_path / "0").symlink_to(here)
    told = run_ranks(2, train_where_its_rank_says, str(tmp_path), *arguments, expect=2)
    assert "the ranks differ in the data set at data.path=latents: " in told[0]


def train_where_its_rank_says(folder: str, *arguments: str) -> None:
    """Train on the folder `latents`, which is another one for each rank."""
    home = Path(folder) / f"home{os.environ['RANK']}"
    home.mkdir()
    (home / "latents").symlink_to(Path(folder) / os.environ["RANK"])
    os.chdir(home)
    runs.train(*arguments, "data.path=latents")


def raise_in_the_loop(*arguments: str) -> None:
    """Train until our own code fails, as a bug would."""
    from dit_ds import monitor

    def log(self: Any, *rest: Any, **named: Any) -> None:
        raise RuntimeError("a bug of ours")

    monitor.Monitor.log = log  # type: ignore[method-assign]
    with contextlib.suppress(RuntimeError):
        runs.train(*arguments)


def test_a_bug_ends_the_process_although_workers_ignore_sigterm(tiny: dict[str, Any]) -> None:
    # Without the loader's own end, the interpreter would wait for its workers for ever.
    run_ranks(1, raise_in_the_loop, *runs.arguments(tiny, FP32, "data.workers=2"))


def test_signals_that_come_while_ranks_compare_notes_are_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        requests = launched.Requests()
        reduce_max = distributed.reduce_max

        def signalled_meanwhile(value: float) -> float:
            os.kill(os.getpid(), signal.SIGTERM)
            return reduce_max(value)

        with monkeypatch.context() as patch:
            patch.setattr(distributed, "reduce_max", signalled_meanwhile)
            assert requests.agreed(stop_after_hours=None) == 0
        assert requests.agreed(stop_after_hours=None) == launched.STOP
        assert requests.agreed(stop_after_hours=None) == 0
        assert requests.agreed(stop_after_hours=1e-9) == launched.STOP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_no_room_for_metrics(*arguments: str) -> str:
    """Train where metrics.jsonl cannot grow beyond a few lines."""
    import io

    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runs.train(*arguments)
    return out.getvalue()


def test_a_disk_too_full_for_metrics_does_not_end_the_training(tiny: dict[str, Any]) -> None:
    told = run_ranks(2, with_no_room_for_metrics, *runs.arguments(tiny, FP32))
    assert "WARNING: metrics or samples could not be written" in told[0]
    assert "step 5/6" in told[0]  # it went on to the end


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (["preview.every=2", "preview.steps=5000"], "preview.steps=5000 exceeds the 1000"),
        (["preview.every=2", "preview.sampler=sde"], "preview.sampler=sde has no meaning for a"),
        (["preview.every=2", "preview.vae=nowhere/to/be/found"], "preview.vae=nowhere"),
    ],
)
def test_previews_that_cannot_work_are_refused_at_the_start(
    tiny: dict[str, Any], override: list[str], sentence: str
) -> None:
    told = run_ranks(2, runs.train, *runs.arguments(tiny, FP32, *override), expect=2)
    assert sentence in told[0] and not tiny["run"].exists()


def test_another_configuration_is_refused_before_the_first_checkpoint_too(
    tiny: dict[str, Any],
) -> None:
    run_ranks(1, runs.train, *runs.arguments(tiny, FP32, "train.steps=1"))
    import shutil

    shutil.rmtree(tiny["run"] / "checkpoints")
    told = run_ranks(1, runs.train, *runs.arguments(tiny, FP32, "seed=5"), expect=2)
    assert "seed=5 (was 0)" in told[0]


def meet_at_a_port_in_use(*arguments: str) -> None:
    """Train where another process has the port."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        os.environ["MASTER_PORT"] = str(s.getsockname()[1])
        runs.train(*arguments)


def test_a_port_that_another_run_has_is_named(tiny: dict[str, Any]) -> None:
    told = run_ranks(1, meet_at_a_port_in_use, *runs.arguments(tiny, FP32), expect=2)
    assert "the ranks cannot meet at 127.0.0.1:" in told[0] and "--master_port" in told[0]


def hold_and_train(*arguments: str) -> None:
    """Train in a folder that a sibling of this process holds."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(Path(arguments[3]), held, done))
    holder.start()
    assert held.wait(30)
    try:
        runs.train(*arguments)
    finally:
        done.set()
        holder.join()


def hold(run: Path, held: Any, done: Any) -> None:
    from dit_ds import files

    run.mkdir()
    with files.lock(run / ".lock"):
        held.set()
        done.wait(60)


def test_a_run_directory_in_use_is_refused(tiny: dict[str, Any]) -> None:
    told = run_ranks(1, hold_and_train, *runs.arguments(tiny, FP32), expect=2)
    assert f"--run {tiny['run']}: {tiny['run']} is in use by process " in told[0]
    run_ranks(1, runs.train, *runs.arguments(tiny, FP32))  # and free again afterwards


def test_a_run_directory_that_cannot_be_made_is_named(tiny: dict[str, Any]) -> None:
    tiny["run"].mkdir()
    (tiny["run"] / "checkpoints").write_text("a file")
    told = run_ranks(2, runs.train, *runs.arguments(tiny, FP32), expect=2)
    assert "checkpoints cannot be written (File exists); choose another run" in told[0]


def raise_on_rank_1() -> str:
    """An error of one rank, in a block that all ranks run."""
    distributed.init()
    try:
        with distributed.agreed():
            if distributed.rank() == 1:
                raise OSError("the disk of this host")
    except distributed.RankError as e:
        return str(e)
    return "no error"


def test_an_error_of_one_rank_is_the_error_of_all_and_names_it() -> None:
    told = run_ranks(3, raise_on_rank_1)
    assert len(set(told)) == 1
    assert told[0].startswith("the disk of this host (rank 1 on ")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_that_are_not_finite_are_skipped_and_counted(
    tiny: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}}
    tree = {"zero_optimization": {"stage": stage}, **fp16}
    run_ranks(2, runs.train, *runs.arguments(tiny, runs.write_json(tmp_path / "ds.json", tree)))
    last = runs.metrics(tiny["run"])[-1]
    assert last["skipped_steps"] == 6 and last["gradient_norm"] is None
    assert last["loss_scale"] == 2.0 ** (32 - 6)
