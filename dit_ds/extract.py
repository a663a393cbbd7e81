"""Class folders of images to a dataset of latents: crop, encode, write shards, then the manifest.

Runs alone or over ranks (`tools/precompute_latents.py`). What a shard holds follows from the
listing alone; encode batches never cross a shard and are filled up to full size; ranks take shards
in turn. So the bytes do not depend on the number of ranks, as long as the ranks have the same kind
of device and, on CPUs, the same number of threads (OMP_NUM_THREADS): a VAE's last bits change with
them.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

import dit_ds
from dit_ds import distributed, latents
from dit_ds.manifest import MANIFEST_NAME, Manifest, ShardInfo, VaeInfo, check_files
from dit_ds.shards import ShardWriter

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

IMAGE_SUFFIXES = frozenset(
    ".bmp .gif .jfif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()  # compared in lower case
)
_OUR_SHARD = re.compile(r"latents-\d{6,}\.tar(\.tmp)?")
_SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class Listing:
    """Labelled image files. `labels[i]` is the place of `paths[i]`'s class in `class_names`."""

    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    num_skipped: int
    """Files that are not images by their suffix."""


@dataclass
class Extraction:
    """A finished dataset, and what happened to the images on the way, over all ranks."""

    manifest: Manifest
    seconds: float
    num_skipped: int
    num_enlarged: int
    """Images smaller than the crop."""
    num_converted: dict[str, int]
    """Images stored in another colour mode than RGB, by Pillow's name for the mode."""


@dataclass
class _Counts:
    enlarged: int = 0
    converted: Counter[str] = field(default_factory=Counter)


def list_class_folders(root: str | Path) -> Listing:
    """The images below `root`, where each folder in `root` is a class.

    Classes are numbered in the order of their names. Images may lie deeper in their class folder.
    The images are shuffled by a hash of their path below `root`, so that each shard mixes classes
    and every machine has the same order.

    Raises:
        ValueError: no such folder, no class folders, images outside of them, an empty class.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"images={root}: no such folder")
    entries = sorted(e for e in root.iterdir() if not e.name.startswith("."))
    folders = [e for e in entries if e.is_dir()]
    stray = [e for e in entries if not e.is_dir()]
    stray_images = [e for e in stray if e.suffix.lower() in IMAGE_SUFFIXES]
    if stray_images:
        raise ValueError(
            f"images={root}: {len(stray_images)} images (first: {stray_images[0].name}) lie "
            "outside of class folders; give a folder with one folder for each class (for images "
            "without classes, move them all into one)"
        )
    if not folders:
        raise ValueError(f"images={root}: holds no class folders; put the images of each in one")
    found: list[tuple[str, int]] = []
    num_skipped, empty = len(stray), []
    for label, folder in enumerate(folders):
        files = list(_files_below(folder))
        images = [f for f in files if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES]
        num_skipped += len(files) - len(images)
        found += [(image, label) for image in images]
        if not images:
            empty.append(folder.name)
    if empty:
        raise ValueError(
            f"images={root}: {len(empty)} of {len(folders)} class folders hold no images (first: "
            f"{empty[0]}); fill or remove them (known are {' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    found.sort(key=lambda item: hashlib.sha256(_name(root, item[0])).digest())
    paths, labels = zip(*found, strict=True)
    return Listing(tuple(f.name for f in folders), paths, labels, num_skipped)


def _files_below(folder: Path) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (os.path.join(where, f) for f in files if not f.startswith("."))


def _name(root: Path, path: str) -> bytes:
    return os.fsencode(Path(os.path.relpath(path, root)).as_posix())


def extract(
    images: str | Path,
    vae: str | Path,
    image_size: int,
    out: str | Path,
    *,
    batch_size: int = 16,
    samples_per_shard: int = 1024,
) -> Extraction:
    """Make the dataset `out` of the class folders in `images`; a collective over all ranks.

    Args:
        images: folder of class folders, see `list_class_folders`.
        vae: folder or hub id of a diffusers `AutoencoderKL`.
        image_size: side of the centre crop in pixels, a multiple of the VAE's factor.
        out: folder for shards and manifest; made if need be, shared by all ranks' hosts.
        batch_size: images that a rank encodes at once; part of what decides the last bits.
        samples_per_shard: all shards but the last hold so many.

    Raises:
        ValueError: a mistake in any of these, or a broken image, told on every rank. No manifest is
            written then.
    """
    began = time.monotonic()
    out = Path(out)
    with distributed.agreed():
        for name, value in {
            "batch_size": batch_size,
            "samples_per_shard": samples_per_shard,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not positive; choose 1 or more")
        if (out / MANIFEST_NAME).exists():
            raise ValueError(f"out={out}: already holds a dataset; remove it or choose another")
        listing = list_class_folders(images)
        model = latents.load_vae(vae, device=distributed.device())
        shape = latents.latent_shape(model, image_size)
        # A folder is named so that it is found from anywhere.
        name = str(Path(vae).resolve()) if Path(vae).is_dir() else str(vae)
        vae_info = VaeInfo(name=name, sha256=latents.vae_hash(model))
        _make_folder(out)
    _agree_on_inputs(Path(images), listing, vae_info)

    shards, counts = _encode_all(listing, model, image_size, out, batch_size, samples_per_shard)
    space = latents.LatentSpace.from_vae(model)
    manifest = Manifest(
        created_by=f"dit_ds {dit_ds.__version__}",
        class_names=listing.class_names,
        image_size=image_size,
        latent_shape=shape,
        scaling_factor=space.scaling_factor,
        shift_factor=space.shift_factor,
        vae=vae_info,
        shards=shards,
    )
    with distributed.agreed():
        if distributed.is_main():
            check_files(out, manifest)  # fails where the ranks' hosts do not share `out`
            for path in out.iterdir():  # what a killed run with other settings left
                if _OUR_SHARD.fullmatch(path.name) and path.name not in {s.name for s in shards}:
                    path.unlink()
            manifest.save(out)
    return Extraction(
        manifest=manifest,
        seconds=time.monotonic() - began,
        num_skipped=listing.num_skipped,
        num_enlarged=counts.enlarged,
        num_converted=dict(sorted(counts.converted.items())),
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out={out}: the folder cannot be made ({error.strerror}); choose another"
        ) from error


def _agree_on_inputs(root: Path, listing: Listing, vae: VaeInfo) -> None:
    """Refuse ranks that see other images, weights or threads: their shards would not fit."""
    names = hashlib.sha256(b"\0".join(_name(root, path) for path in listing.paths)).hexdigest()
    mine = {
        "images": f"{len(listing.paths)} in {len(listing.class_names)} classes, names {names[:12]}",
        "VAE weights": vae.sha256[:12],
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        "device": distributed.device().type,
    }
    everyone = distributed.gather_json(mine)
    for what in mine:
        seen = {str(theirs[what]): rank for rank, theirs in enumerate(everyone)}
        if len(seen) > 1:
            told = "; ".join(f"{value} (rank {rank})" for value, rank in seen.items())
            raise distributed.RankError(f"the ranks differ in {what}: {told}; make them equal")


def _encode_all(
    listing: Listing,
    vae: AutoencoderKL,
    image_size: int,
    out: Path,
    batch_size: int,
    samples_per_shard: int,
) -> tuple[tuple[ShardInfo, ...], _Counts]:
    """Write all shards, a round of one shard on each rank after the other.

    The ranks meet after each round, so that a rank's error stops all of them soon.
    """
    total, world = len(listing.paths), distributed.world_size()
    starts = range(0, total, samples_per_shard)
    counts = _Counts()
    mine: dict[int, ShardInfo] = {}
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, _Progress(total) as progress:
        for first in range(0, len(starts), world):
            number = first + distributed.rank()
            with distributed.agreed():
                if number < len(starts):
                    ids = range(starts[number], min(starts[number] + samples_per_shard, total))
                    path = out / f"latents-{number:06d}.tar"
                    encoded = _encoded(listing, ids, vae, image_size, batch_size, pool, counts)
                    with ShardWriter(path) as shard:
                        for i, moments in encoded:
                            shard.add(f"{i:09d}", moments, listing.labels[i])
                            progress.advance(min(world, len(starts) - first))
                    mine[number] = shard.info
            progress.reach(min((first + world) * samples_per_shard, total))
    infos: dict[int, ShardInfo] = {}
    gathered = distributed.gather_json(
        {
            "shards": {number: info.model_dump() for number, info in mine.items()},
            "enlarged": counts.enlarged,
            "converted": counts.converted,
        }
    )
    for theirs in gathered:
        infos |= {int(n): ShardInfo.model_validate(s) for n, s in theirs["shards"].items()}
    return tuple(infos[n] for n in range(len(starts))), _Counts(
        sum(theirs["enlarged"] for theirs in gathered),
        sum((Counter(theirs["converted"]) for theirs in gathered), Counter()),
    )


def _encoded(
    listing: Listing,
    ids: range,
    vae: AutoencoderKL,
    image_size: int,
    batch_size: int,
    pool: ThreadPoolExecutor,
    counts: _Counts,
) -> Iterator[tuple[int, np.ndarray]]:
    """(id, moments (2, 2C, h, w)) of a shard's samples, in order.

    After a broken image nothing is encoded any more, but the shard is read to its end, so that the
    ValueError names all broken images in it.
    """
    batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
    broken: list[str] = []
    reads = _read_ahead(pool, image_size, [[listing.paths[i] for i in b] for b in batches])
    for batch, futures in zip(batches, reads, strict=True):
        crops = []
        for future in futures:
            try:
                crop, mode, short_side = future.result()
            except ValueError as error:
                broken.append(str(error))
                continue
            crops.append(crop)
            counts.enlarged += short_side < image_size
            if mode != "RGB":
                counts.converted[mode] += 1
        if not broken:
            filled = np.stack(crops + crops[-1:] * (batch_size - len(crops)))
            moments = latents.encode(vae, filled, names=[listing.paths[i] for i in batch])
            yield from zip(batch, moments, strict=False)  # without what fills up
    if broken:
        more = f"\n... and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ValueError(
            "\n".join(broken[:10]) + more + "\nrepair or remove what is broken, and start again"
        )


def _read_ahead(
    pool: ThreadPoolExecutor, image_size: int, batches: Iterable[Sequence[str]]
) -> Iterator[list[Future[tuple[np.ndarray, str, int]]]]:
    """The crops of each batch; the next batch is read while the caller works on this one."""
    waiting: deque[list[Future[tuple[np.ndarray, str, int]]]] = deque()
    for paths in batches:
        waiting.append([pool.submit(_read_crop, path, image_size) for path in paths])
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _read_crop(path: str, image_size: int) -> tuple[np.ndarray, str, int]:
    """The crop, the colour mode it was stored in, and its short side in pixels."""
    image, mode = latents.read_image(path)
    return latents.center_crop(image, image_size), mode, min(image.size)


class _Progress:
    """Rank 0's bar over all images; a line now and then where there is no terminal.

    Between the meetings of the ranks it takes the others to be as fast as rank 0.
    """

    def __init__(self, total: int) -> None:
        hidden = not (distributed.is_main() and sys.stderr.isatty())
        self._bar = tqdm(total=total, unit="img", disable=hidden)
        self._lines = hidden and distributed.is_main()
        self._total, self._done = total, 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, num: int) -> None:
        """So many more are encoded, estimated."""
        self.reach(min(self._done + num, self._total))

    def reach(self, done: int) -> None:
        """So many are encoded in all."""
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._lines and now - self._told > _SECONDS_BETWEEN_LINES:
            rate = done / (now - self._began)
            left = (self._total - done) / rate
            print(
                f"{done}/{self._total} images, {rate:.1f} images/s, {left:.0f} s left", flush=True
            )
            self._told = now
