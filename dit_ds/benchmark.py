"""What data and checkpoints reach, as ratios to a limit or a peer that is measured in the same run.

Absolute times on shared machines mean nothing. Run by `tools/benchmark.py`; figures stand in
tools/BENCHMARKS.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit_ds import config, distributed, latents
from dit_ds.archive import chunks_of
from dit_ds.checkpoint import Checkpoints, Committed
from dit_ds.extract import extract
from dit_ds.loader import Split
from dit_ds.manifest import Folder, Manifest, ShardInfo, VaeInfo
from dit_ds.models import DIT_MODELS
from dit_ds.order import Order
from dit_ds.retention import Keep
from dit_ds.samples import Samples
from dit_ds.shards import ShardWriter

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_BATCH = 256


def medians(ways: dict[str, Callable[[], None]], *, num_items: int, repeats: int) -> dict[str, int]:
    """Items per second of each way of doing the same work, the median of `repeats` turns.

    The ways take turns, so that what else the machine does falls on all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=len(ways) * (repeats + 1), disable=None, leave=False) as bar:
        for turn in range(repeats + 1):
            for name, way in ways.items():
                bar.set_description(name)
                began = time.perf_counter()
                way()
                if turn:  # the first one fills the page cache
                    seconds[name].append(time.perf_counter() - began)
                bar.update()
    return {name: round(num_items / statistics.median(s)) for name, s in seconds.items()}


def loader(
    *, latent_shape: tuple[int, int, int] = (4, 32, 32), num_samples: int = 8192, repeats: int = 5
) -> dict[str, float]:
    """Samples per second from the page cache, on one thread, over the same samples.

    floor: `preadv` of the same bytes in the same shuffled order into the batch buffer.
    read: our loader, order and all, giving float16 moments.
    read_and_draws: the same in float32 with all raw draws.
    read_first_epoch: `read` as a run begins, with each shard's checksum.
    webdataset: a plain webdataset pipeline over the same shards.
    file_per_sample: a `.npy` for each sample's moments and one for its class.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = _make_data(folder, latent_shape, num_samples)
        sizes = [shard.num_samples for shard in manifest.shards]
        order = Order(sizes, global_batch=_BATCH, lanes=64, window=16, seed=0)
        steps = range(num_samples // _BATCH)
        samples = Samples(Folder(folder), manifest, seed=0, flip=0.5)
        flips = np.random.default_rng(0).integers(0, 2, _BATCH)

        def read(samples: Samples = samples) -> None:
            for step in steps:
                samples.values(order.batch(step)[1], flips)

        def read_and_draws() -> None:
            for step in steps:
                samples.read(*order.batch(step), _BATCH)

        ways = {
            "floor": _preadv(folder, manifest, [order.batch(s)[1] for s in steps], flips),
            "read": read,
            "read_and_draws": read_and_draws,
            "read_first_epoch": lambda: read(Samples(Folder(folder), manifest, seed=0, flip=0.5)),
            "webdataset": _webdataset(folder, manifest),
            "file_per_sample": _files(folder, [order.batch(s)[1] for s in steps]),
        }
        rates: dict[str, float] = dict(medians(ways, num_items=num_samples, repeats=repeats))
    return rates | {
        "floor_over_read": rates["floor"] / rates["read"],
        "read_over_file_per_sample": rates["read"] / rates["file_per_sample"],
        "read_over_webdataset": rates["read"] / rates["webdataset"],
    }


def precompute(
    *, image_size: int = 128, batch_size: int = 8, num_images: int = 128, repeats: int = 5
) -> dict[str, float]:
    """Images per second that become shards, files and all, and that the bare VAE encodes.

    bare: the same VAE on the same batch size, images and mirror images, nothing else.
    ours: `extract` from its first batch to its last file. The VAE is a quarter as wide as Stable
    Diffusion's, untrained; the images are JPEG files of twice the size.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vae = _make_vae(folder / "vae")
        _make_images(folder / "images", num_images, 2 * image_size)
        pixels = np.random.default_rng(0).integers(0, 256, (batch_size, image_size, image_size, 3))
        ours: list[float] = []
        bare: list[float] = []
        for turn in tqdm(range(repeats + 1), disable=None, leave=False):
            out = folder / f"out-{turn}"
            done = extract(
                folder / "images", folder / "vae", image_size, out, batch_size=batch_size
            )
            assert done is not None
            began = time.perf_counter()
            for _ in range(num_images // batch_size):
                latents.encode(vae, pixels.astype(np.uint8))
            if turn:  # the first one fills caches
                bare.append(time.perf_counter() - began)
                ours.append(done.encoding_seconds)
    rates = [num_images / statistics.median(seconds) for seconds in (bare, ours)]
    return {"bare": rates[0], "ours": rates[1], "ours_over_bare": rates[1] / rates[0]}


def _make_vae(folder: Path) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae.save_pretrained(folder)
    return latents.load_vae(folder, device=distributed.device())


def _make_images(folder: Path, num: int, size: int) -> None:
    (folder / "class").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 12, 3), np.uint8))
        coarse.resize((size * 4 // 3, size)).save(folder / "class" / f"{i}.jpg", quality=90)


def order(*, num_shards: int = 100_000, repeats: int = 5) -> dict[str, float]:
    """Seconds until the samples of a step in the middle of epoch 3 are known, of a billion.

    open_seconds: the manifest from the page cache. first_batch_seconds: in a process that knows no
    order yet. next_batch_seconds: of each step after it.
    """
    shards = tuple(
        ShardInfo(name=f"s-{i:06d}.tar", num_samples=10_000, num_bytes=1, sha256=f"{i:064x}")
        for i in range(num_shards)
    )
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        manifest = _make_data(Path(temporary), (4, 4, 4), 1)
        manifest.model_copy(update={"shards": shards}).save(temporary)
        for _ in range(repeats):
            times = [time.perf_counter()]
            manifest = Manifest.load(temporary)
            times.append(time.perf_counter())
            sizes = [shard.num_samples for shard in manifest.shards]
            order = Order(sizes, global_batch=_BATCH, lanes=64, window=16, seed=0)
            step = int(2.5 * manifest.num_samples / _BATCH)
            order.batch(step)
            times.append(time.perf_counter())
            for i in range(1, 1001):
                order.batch(step + i)
            times.append(time.perf_counter())
            opening, first, others = np.diff(times)
            for name, value in {
                "open_seconds": opening,
                "first_batch_seconds": first,
                "next_batch_seconds": others / 1000,
            }.items():
                found.setdefault(name, []).append(float(value))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"num_samples": manifest.num_samples} | medians


def _make_data(folder: Path, latent_shape: tuple[int, int, int], num_samples: int) -> Manifest:
    channels, high, wide = latent_shape
    rng, shards = np.random.default_rng(0), []
    for first in range(0, num_samples, 1024):
        with ShardWriter(folder / f"latents-{first // 1024:06d}.tar") as shard:
            for i in range(first, min(first + 1024, num_samples)):
                moments = rng.standard_normal((2, 2 * channels, high, wide), np.float32)
                shard.add(f"{i:09d}", moments.astype(np.float16), i % 1000)
                np.save(folder / f"{i}.npy", moments[0].astype(np.float16))
                np.save(folder / f"{i}.label.npy", np.array([i % 1000]))
        shards.append(shard.info)
    return Manifest(
        created_by="benchmark",
        class_names=tuple(map(str, range(1000))),
        image_size=8 * high,
        latent_shape=latent_shape,
        scaling_factor=0.18215,
        vae=VaeInfo(name="none", sha256="0" * 64),
        shards=tuple(shards),
    )


def _preadv(
    folder: Path, manifest: Manifest, batches: list[np.ndarray], flips: np.ndarray
) -> Callable[[], None]:
    """Reads of exactly the bytes of each image's moments, whose places were found before."""
    places = []  # by sample: file and first byte
    for shard in manifest.shards:
        file = os.open(folder / shard.name, os.O_RDONLY)
        with tarfile.open(folder / shard.name, "r:") as tar:
            members = [m for m in tar if m.name.endswith(".npy")]
        places += [(file, m.offset_data + 128) for m in members]
    size = 2 * int(np.prod(manifest.moments_shape))
    buffer = memoryview(bytearray(_BATCH * size))
    views = [[buffer[i * size : (i + 1) * size]] for i in range(_BATCH)]
    reads = []
    for ids in batches:
        rows = zip(views, [places[i] for i in ids], flips.tolist(), strict=True)
        reads.append([(view, file, first + flip * size) for view, (file, first), flip in rows])

    def run() -> None:
        for batch in reads:
            for view, file, offset in batch:
                os.preadv(file, view, offset)

    return run


def _webdataset(folder: Path, manifest: Manifest) -> Callable[[], None]:
    import webdataset

    paths = [str(folder / shard.name) for shard in manifest.shards]

    def run() -> None:
        dataset = webdataset.WebDataset(paths, shardshuffle=100).shuffle(1000).decode()
        for _ in dataset.to_tuple("moments.npy", "cls").batched(_BATCH):
            pass

    return run


def _files(folder: Path, batches: list[np.ndarray]) -> Callable[[], None]:
    def run() -> None:
        for ids in batches:
            names = [str(folder / str(i)) for i in ids]
            np.stack([np.load(f"{name}.npy", allow_pickle=False) for name in names])
            np.stack([np.load(f"{name}.label.npy", allow_pickle=False) for name in names])

    return run


def checkpoint(*, sizes: dict[str, int] | None = None, repeats: int = 5) -> dict[str, float]:
    """Seconds that training waits for a checkpoint, and how fast it gets to the disk.

    plain: write and fsync of the same bytes, in the same pieces, into one file.
    pause: what the step loop waits for, the copy into host memory and the commit; the rest goes on
        in the background (`write`, up to and with the commit).
    blocking: the same save, waited for to its end.
    deepspeed: `engine.save_checkpoint` of the same engine, which neither syncs nor checksums.

    One rank at ZeRO stage 2 in float32, DiT-B/2 unless told (130 M parameters: weights, two
    moments and EMA are 2.1 GB), after one step of training.
    """
    distributed.init()
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder = Path(temporary)
        stage_2 = {"zero_optimization": {"stage": 2}}
        engine, about = make_engine(sizes or DIT_MODELS["DiT-B/2"], stage_2)
        step_on_noise(engine)  # the optimizer then has its state
        checkpoints = Checkpoints(engine, folder / "checkpoints", Keep(1))
        step, found = 0, defaultdict[str, list[float]](list)

        def timed(name: str, function: Callable[[], object]) -> None:
            began = time.perf_counter()
            function()
            found[name].append(time.perf_counter() - began)

        def save() -> None:
            nonlocal step
            step += 1
            checkpoints.save(step=step, about=about, metrics={})

        def committed(*, wait: bool) -> Committed:
            while (done := checkpoints.commit(wait=wait)) is None:
                time.sleep(0.005)  # where steps would be
            return done

        save()
        num_bytes = committed(wait=True).num_bytes
        data = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8).data
        for _ in tqdm(range(repeats + 1), disable=None, leave=False):
            timed("plain", lambda: _write_plainly(data, folder / "plain"))
            (folder / "plain").unlink()
            save()
            found["blocking"].append(committed(wait=True).pause_seconds)
            save()
            done = committed(wait=False)
            found["pause"].append(done.pause_seconds)
            found["write"].append(done.write_seconds)
            checkpoints.commit(wait=True)  # until the one before is removed
            timed("deepspeed", lambda: engine.save_checkpoint(str(folder / "deepspeed")))
            shutil.rmtree(folder / "deepspeed")
    # The first turn fills caches.
    seconds = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "bytes": num_bytes,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "pause_over_blocking": seconds["pause"] / seconds["blocking"],
        "bandwidth_over_plain_write": seconds["plain"] / seconds["write"],
        "pause_over_deepspeed": seconds["pause"] / seconds["deepspeed"],
    }


def make_engine(
    sizes: dict[str, int],
    ds_config: dict[str, Any],
    *,
    micro_steps: int = 1,
    checkpoint_every: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """An engine of a DiT of these sizes, a sample in each micro-batch, and what is known of it."""
    from dit_ds import train

    model = {"input_size": 32, "in_channels": 4, "num_classes": 1000, **sizes}
    cfg = config.parse(
        {"model": sizes | {"checkpoint_every": checkpoint_every}}, source="benchmark"
    )
    world = distributed.world_size()
    split = Split.of(global_batch=world * micro_steps, world_size=world, micro_batch=1)
    engine = train.build_engine(cfg, ds_config, split, model)
    return engine, {"config": cfg.model_dump(mode="json"), "weights": {"model": model}}


def step_on_noise(engine: Any, num_samples: int = 1) -> None:
    """An optimizer step of all its micro-steps, of so many samples each."""
    device = distributed.device()
    x = torch.randn(num_samples, 4, 32, 32, device=device)
    t = torch.zeros(num_samples, device=device)
    y = torch.zeros(num_samples, dtype=torch.int64, device=device)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(x, t, y).square().mean(), scale_wrt_gas=False)
        engine.step()


def _write_plainly(data: memoryview, path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for chunk in chunks_of(data):
            file.write(chunk)
        os.fsync(file.fileno())
