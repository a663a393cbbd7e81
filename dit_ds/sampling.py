"""Many images over ranks and hosts: 50,000 of them, for an FID, into one file that others read.

    FILE.npz   arr_0 (N, H, W, 3) uint8, as the evaluator of Dhariwal & Nichol 2021 (ADM) reads it,
               and labels (N,) int64; not compressed
    GRID.png   the first images of the first classes, a row for each class

Batches are cut by image numbers alone and dealt out to the ranks in turn; rank 0 takes one after
another and writes it. So all images are the same, bit for bit, on any number of ranks, and no rank
holds more than two batches of them. `tools/sample.py` is the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from dit_ds import distributed, draws, files, latents, objectives
from dit_ds.batch import Model
from dit_ds.export import Description
from dit_ds.heartbeat import Heartbeat
from dit_ds.progress import Progress
from dit_ds.samplers import SamplerSettings, sample

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

GRID_SIDE = 16
"""The grid shows at most so many classes, and so many images of each."""
_PICTURES = (".png", ".jpg", ".webp")
_SPARE_BYTES = 1 << 24  # headers, and what else is written meanwhile
_SECONDS_BETWEEN_LOOKS = 0.05


def parse_classes(text: str, num_classes: int) -> list[int]:
    """Class numbers out of `0-9,12`, each one the model has."""
    classes: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"--classes {text}: expected numbers and ranges, such as 0-9,12")
        first, last = int(low), int(high if dash else low)
        if first > last:
            raise ValueError(f"--classes {text}: {part.strip()} is empty; write {last}-{first}")
        if last >= num_classes:
            raise ValueError(f"--classes {text}: the model knows classes 0-{num_classes - 1}")
        classes += range(first, last + 1)
    return classes


def parse_interval(text: str) -> tuple[float, float]:
    """Two numbers out of `LOW,HIGH`."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--guidance-interval {text}: expected LOW,HIGH such as 0,1") from None
    return low, high


def random_labels(classes: list[int], num: int, seed: int) -> torch.Tensor:
    """(num,) int64 of `classes`, each as likely; image i's depends on the seed and i alone.

    Source: Dhariwal & Nichol 2021 and Peebles & Xie 2023 draw the classes of an FID so.
    """
    drawn = draws.bits(seed, "sample_label", 0, np.arange(num)) % np.uint64(len(classes))
    return torch.tensor(classes)[torch.from_numpy(drawn.astype(np.int64))]


def check_outputs(out: Path, npz: Path | None, *, num: int, image_shape: tuple[int, int]) -> None:
    """Raise ValueError if `num` images cannot be written there; makes the folders."""
    if out.suffix not in _PICTURES:
        raise ValueError(f"--out {out}: name a picture, such as grid.png")
    if npz is not None and npz.suffix != ".npz":
        raise ValueError(f"--npz {npz}: name a file that ends in .npz")
    (high, wide), pixels = image_shape, math.prod(image_shape) * 3
    num_bytes = {out: min(num, GRID_SIDE**2) * pixels}
    if npz is not None:
        num_bytes[npz] = num * (pixels + 8) + num_bytes[out]
    for path, needed in num_bytes.items():
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ValueError(f"{path}: {path.parent} may not be written to")
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)  # of a start that was killed
        free, needed = shutil.disk_usage(path.parent).free, needed + _SPARE_BYTES
        if free < needed:
            size = high if high == wide else f"{high}x{wide}"
            raise ValueError(
                f"{path}: {num} images of {size} pixels take {needed / 1e9:.2f} GB, and "
                f"{path.parent} has {free / 1e9:.2f} GB; make room, or ask for fewer"
            )


def objective_of(about: Description) -> objectives.Objective:
    """What the weights were trained for."""
    return objectives.build(
        about.objective,
        num_classes=about.num_classes,
        learn_sigma=about.model.learn_sigma,
        latent_shape=about.latent_shape,
    )


def draw(
    model: Model,
    about: Description,
    settings: SamplerSettings,
    vae: AutoencoderKL,
    labels: torch.Tensor,
) -> Iterator[np.ndarray | None]:
    """An image for each label, batch after batch: (n, H, W, 3) uint8 on rank 0, else None.

    A collective over all ranks, which take as many batches each: ceil(N / settings.batch_size).

    Args:
        model: with the averaged weights, on this rank's device, as is the vae.
        about: of these weights.
        settings: image i of its seed has the noise of number i.
        vae: what decodes.
        labels: (N,) int64, the classes.

    Raises:
        RankError: the ranks are not asked for the same, or one could not make its images.
    """
    asked = [about.model_dump(), dataclasses.asdict(settings), labels.tolist()]
    distributed.agree_on("the weights or in what to make of them", asked)
    rank, world = distributed.rank(), distributed.world_size()
    batches = torch.arange(len(labels)).split(settings.batch_size)
    if len(batches) < world:
        distributed.print_main(
            f"only {len(batches)} of {world} ranks have images to make: {len(labels)} are so many "
            f"batches; --batch-size {math.ceil(len(labels) / world)} would give all ranks some"
        )
    store = distributed.shared_store()
    progress = Progress(store, total=len(labels) * settings.num_calls)
    objective = objective_of(about)
    space = latents.LatentSpace(about.scaling_factor, about.shift_factor)

    def make(ids: torch.Tensor) -> torch.Tensor:
        def counted(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            store.add("work", len(ids))  # a call for each of these
            progress.show()
            return model(x, t, y)

        z = sample(
            counted,
            objective,
            settings,
            classes=labels[ids],
            latent_shape=about.latent_shape,
            image_ids=ids.tolist(),
            device=distributed.device(),
            progress=False,
        )
        images = torch.from_numpy(latents.decode(vae, z, space))
        store.add("images", len(ids))
        progress.show()
        return images

    def take_turn(first: int) -> torch.Tensor:
        try:
            mine = first + rank
            return make(batches[mine]) if mine < len(batches) else torch.empty(0)
        finally:
            # No collective yet: it would wait for the others for half an hour and no longer.
            store.add("turns", 1)
            while store.add("turns", 0) < first + world:
                progress.show()
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    with Heartbeat(store) as heartbeat, progress:
        for first in range(0, len(batches), world):
            images = torch.empty(0)
            with distributed.agreed():
                try:
                    images = take_turn(first)
                except dist.DistError:
                    heartbeat.end_without(0, "is gone")
            for source, ids in enumerate(batches[first : first + world]):
                if distributed.is_main() and source != 0:
                    shape = (len(ids), *about.image_shape, 3)
                    images = torch.empty(shape, dtype=torch.uint8)
                distributed.bring_to_main(images, source)
                yield images.numpy() if distributed.is_main() else None


def write(
    batches: Iterable[np.ndarray | None],
    labels: torch.Tensor,
    image_shape: tuple[int, int],
    out: Path,
    npz: Path | None,
) -> int:
    """Write what `draw` makes; a collective. Files appear at the end, whole, or not at all.

    Returns:
        How many images the grid shows.

    Raises:
        RankError: they could not be made or written.
    """
    grid, all_images = Grid(labels), None
    with contextlib.ExitStack() as stack:
        with _writing(npz):
            if distributed.is_main() and npz is not None:
                all_images = stack.enter_context(npz_file(npz, labels, image_shape))
        for batch in batches:
            with _writing(npz):
                if batch is not None:
                    grid.add(batch)
                    if all_images is not None:
                        all_images.write(batch.data)
        with _writing(npz):
            stack.close()
    with _writing(out):
        if distributed.is_main():
            with files.atomic_file(out) as picture:
                grid.sheet().save(picture, format=Image.registered_extensions()[out.suffix])
    return grid.num_images


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[None]:
    """What may fail on rank 0 alone; all ranks raise then."""
    with distributed.agreed():
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror or error}); what was there is untouched"
            ) from error


@contextlib.contextmanager
def npz_file(path: Path, labels: torch.Tensor, image_shape: tuple[int, int]) -> Iterator[IO[bytes]]:
    """Where to write the bytes of all images to, one after another, each (H, W, 3) uint8.

    numpy would need them all at once. After an error in it, `path` is as it was.
    """
    with files.atomic_path(path) as temporary, contextlib.ExitStack() as stack:
        file = stack.enter_context(open(temporary, "wb"))
        archive = stack.enter_context(zipfile.ZipFile(file, "w"))
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, labels.numpy(), allow_pickle=False)
        images = stack.enter_context(archive.open("arr_0.npy", "w", force_zip64=True))
        shape = (len(labels), *image_shape, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(images, header)
        try:
            yield images
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk would be full again
                stack.close()
            raise


class Grid:
    """The first `GRID_SIDE` images of the first `GRID_SIDE` classes, kept as they come by.

    labels: (N,) of all images. Classes stand in the order in which they first come.
    """

    def __init__(self, labels: torch.Tensor) -> None:
        classes = list(dict.fromkeys(labels.tolist()))[:GRID_SIDE]
        rows = [(labels == c).nonzero()[:GRID_SIDE, 0].tolist() for c in classes]
        self._rows, self._columns = len(rows), max(len(row) for row in rows)
        self._cells = {
            image: y * self._columns + x
            for y, row in enumerate(rows)
            for x, image in enumerate(row)
        }
        self._images: np.ndarray | None = None
        self._num_seen = 0

    @property
    def num_images(self) -> int:
        """How many it shows."""
        return len(self._cells)

    def add(self, batch: np.ndarray) -> None:
        """The next images, (n, H, W, 3) uint8."""
        if self._images is None:  # cells without an image stay white
            self._images = np.full((self._rows * self._columns, *batch.shape[1:]), 255, np.uint8)
        for number, image in enumerate(batch, start=self._num_seen):
            if number in self._cells:
                self._images[self._cells[number]] = image
        self._num_seen += len(batch)

    def sheet(self) -> Image.Image:
        """The picture, a row for each class."""
        assert self._images is not None
        return latents.image_grid(self._images, rows=self._rows, columns=self._columns)
