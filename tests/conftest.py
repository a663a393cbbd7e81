"""Shared by the tests: small data sets, and ranks forked from a warm server.

Importing torch and DeepSpeed takes seconds, a real launch tens of them. So the ranks of a test are
forked from a server that has imported everything already; they are real processes with a real gloo
process group and real DeepSpeed engines.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import yaml

from dit_ds.manifest import Manifest, VaeInfo
from dit_ds.shards import ShardWriter

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(
    [
        "dit_ds.train",
        # What DeepSpeed and torch's optimizers would import at their first use, for seconds.
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "torch._subclasses.schema_check_mode",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.module_inject.auto_ep_layer",
        "numpy.ma",
        "numpy.ctypeslib",
        "diffusers",
        "tests.conftest",
        "tests.warm",
    ]
)

REPO = Path(__file__).parents[1]


def make_latents(
    folder: Path,
    counts: tuple[int, ...] = (40, 40, 20),
    channels: int = 4,
    size: int | tuple[int, int] = 4,
    first: int = 0,
) -> Manifest:
    """A data set of random moments in shards of these sizes, with three classes.

    `first`, the number in the first key, also makes the values others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    high, wide = (size, size) if isinstance(size, int) else size
    shards, number = [], first
    for i, count in enumerate(counts):
        with ShardWriter(folder / f"shard-{i:06d}.tar") as writer:
            for _ in range(count):
                moments = rng.normal(size=(2, 2 * channels, high, wide)).astype(np.float16)
                writer.add(f"{number:09d}", moments, number % 3)
                number += 1
        shards.append(writer.info)
    manifest = Manifest(
        created_by="tests",
        class_names=("a", "b", "c"),
        image_size=min(high, wide) * 8,
        latent_shape=(channels, high, wide),
        scaling_factor=0.5,
        vae=VaeInfo(name="none", sha256="0" * 64),
        shards=tuple(shards),
    )
    manifest.save(folder)
    return manifest


TINY = {
    "name": "tiny",
    "model": {"patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2},
    "data": {"workers": 0, "window": 2},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2, "gradient_clipping": 1.0, "ema_decay": 0.99},
    "train": {
        "steps": 6,
        "global_batch_size": 12,
        "micro_batch_size": 4,
        "log_every": 1,
        "checkpoint_every": 3,
    },
}
FP32 = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """A tiny recipe on disk with its data: {"recipe", "run", "tree"}."""
    return make_tiny(tmp_path)


def make_tiny(folder: Path) -> dict[str, Any]:
    """What `tiny` is, in a folder of one's own."""
    make_latents(folder / "latents")
    tree = yaml.safe_load(yaml.safe_dump(TINY))
    tree["data"]["path"] = str(folder / "latents")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return {"recipe": folder / "tiny.yaml", "run": folder / "run", "tree": tree}


def hear_ctrl_c() -> None:
    """For `preexec_fn`: SIGINT as in a terminal, also where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, expect: int | None = 0
) -> list[Any]:
    """Call `function(*arguments)` in `world` ranks; their results, or their exits compared.

    `function` must be importable. With `expect` not 0, every rank must exit with that code and the
    result is the output (stdout and stderr) of each rank.
    """
    results = _forkserver.SimpleQueue()
    ranks = _start(world, results, function, arguments)
    found: dict[int, tuple[Any, str, str]] = {}
    while len(found) < world and (any(p.is_alive() for p in ranks) or not results.empty()):
        if not results._reader.poll(0.2):  # type: ignore[attr-defined]
            continue
        rank, value, output, trace = results.get()
        found[rank] = (value, output, trace)
        if trace and (expect == 0 or not trace.startswith("exited with")):
            for process in ranks:
                process.kill()
            pytest.fail(f"rank {rank}:\n{output}\n{trace}", pytrace=False)
    for process in ranks:
        process.join()
    codes = [p.exitcode for p in ranks]
    outputs = "\n".join(f"rank {r}:\n{o}" for r, (_, o, _) in sorted(found.items()))
    assert codes == [expect] * world, f"exit codes {codes}\n{outputs}"
    return [found[r][0] if expect == 0 else found[r][1] for r in range(world)]


def kill_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Call a `function` that kills a rank, then kill the others; their exit codes."""
    results = _forkserver.SimpleQueue()  # lives as long as the ranks
    ranks = _start(world, results, function, arguments)
    while all(process.is_alive() for process in ranks):
        time.sleep(0.02)
    # What the others do now must not matter: they may go on for a while, or not at all.
    for process in ranks:
        process.join(timeout=random.random())
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def _start(
    world: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> list[Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = _forkserver.Process(
            target=_rank, args=(environment, results, function, arguments)
        )
        process.start()
        ranks.append(process)
    return ranks


def _rank(
    environment: dict[str, str],
    results: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import io

    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    output, value, trace, code = io.StringIO(), None, "", 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            value = function(*arguments)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            trace, code = traceback.format_exc(), 1
    if code and not trace:
        trace = f"exited with {code}"
    results.put((int(environment["RANK"]), value, output.getvalue(), trace))
    sys.exit(code)
