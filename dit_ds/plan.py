"""What decides the bytes of a data set, fixed at the first start of its extraction: `plan.json`.

Every rank and every restart goes by the plan, so that equal plans give equal bytes, for any number
of ranks and workers and after any kill. A VAE's last bits change with the batch size, the number of
threads, the device and the versions of what computes, hence all of those. The plan stays beside the
data set; copied into another folder, with `listing.jsonl` where there is one, it makes it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pydantic
import torch

import dit_ds
from dit_ds import distributed, latents, remote
from dit_ds.files import write_atomically
from dit_ds.manifest import VaeInfo
from dit_ds.sources import Listing, Tars
from dit_ds.units import ListedSource, TarSource

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PLAN_NAME, LISTING_NAME = "plan.json", "listing.jsonl"
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_BATCH = 64
_GOOD = 0.95  # of the best rate; more is not worth the memory
_LONG_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a user asks for. None asks for nothing: it is as planned, or decided now."""

    images: str
    vae: VaeInfo
    image_size: int
    classes: tuple[str, ...] | None
    batch_size: int | None
    precision: Precision | None
    threads: int | None
    samples_per_shard: int | None


class Plan(pydantic.BaseModel):
    """Everything that decides the bytes of a data set."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    images: str
    source: ListedSource | TarSource = pydantic.Field(discriminator="kind")
    vae: VaeInfo
    image_size: pydantic.PositiveInt
    samples_per_shard: pydantic.PositiveInt
    batch_size: pydantic.PositiveInt
    threads: pydantic.PositiveInt
    """Of each rank, for what a CPU computes."""
    precision: Precision
    device: str
    """The model of GPU or CPU."""
    versions: dict[str, str]

    @staticmethod
    def load(out: Path) -> Plan | None:
        """The plan in a folder, or None; a ValueError if it is not one of this version."""
        path = out / PLAN_NAME
        if not path.exists():
            return None
        try:
            return Plan.model_validate_json(path.read_bytes())
        except pydantic.ValidationError as error:
            raise ValueError(
                f"{path}: not a plan of this version; remove {out} to begin anew"
            ) from error

    @property
    def sha256(self) -> str:
        """Of all that it says: the records of finished work carry it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def save(self, out: Path) -> None:
        """Write `plan.json`, atomically."""
        write_atomically(out / PLAN_NAME, self.model_dump_json(indent=1) + "\n")

    def refuse_others(self, asked: Asked, out: Path) -> None:
        """Raise a ValueError if something that was asked for is not as planned."""
        for field in dataclasses.fields(asked):
            value, planned = getattr(asked, field.name), self._planned(field.name)
            if isinstance(value, VaeInfo):  # known by its weights, wherever they lie
                value, planned = f"weights {value.sha256[:12]}", f"weights {self.vae.sha256[:12]}"
            if value is not None and value != planned:
                value, planned = (textwrap.shorten(str(v), 200) for v in (value, planned))
                raise ValueError(
                    f"{field.name}={value}, but {out} was begun with {field.name}={planned}; go on "
                    "with that, or remove the folder to begin anew"
                )

    def _planned(self, name: str) -> object:
        return self.source.class_names if name == "classes" else getattr(self, name)

    def refuse_another_machine(self, out: Path) -> None:
        """Raise a ValueError if this process computes by other means than planned."""
        here = {"device": device_model(), **versions()}
        planned = {"device": self.device, **self.versions}
        for name in planned:
            if here.get(name) != planned[name]:
                raise ValueError(
                    f"{name} is {here.get(name)}, but {out} was begun with {planned[name]}, and "
                    "its bytes depend on that; go on with the same, or remove the folder to begin "
                    "anew"
                )


def make(
    asked: Asked, found: Listing | Tars, model: AutoencoderKL, out: Path, ranks_on_host: int
) -> Plan:
    """Decide what was not asked for, and write down what every rank must know below `out`.

    Leaves `model` on this rank's device, in the plan's precision.
    """
    source: ListedSource | TarSource
    if isinstance(found, Tars):
        source = TarSource.look(found, asked.classes, out / "work")
    elif asked.classes is not None:
        raise ValueError("classes names the labels of tars; here the source names its classes")
    else:
        source = ListedSource.write(found, out / LISTING_NAME)
    precision, threads = asked.precision or "fp32", asked.threads or default_threads(ranks_on_host)
    samples_per_shard = asked.samples_per_shard or 1024
    torch.set_num_threads(threads)
    latents.move_vae(model, distributed.device(), DTYPES[precision])
    batch_size = asked.batch_size or find_batch_size(model, asked.image_size, samples_per_shard)
    plan = Plan(
        images=asked.images,
        source=source,
        vae=asked.vae,
        image_size=asked.image_size,
        samples_per_shard=samples_per_shard,
        batch_size=batch_size,
        threads=threads,
        precision=precision,
        device=device_model(),
        versions=versions(),
    )
    plan.save(out)
    return plan


def check_folders(images: str, vae: str, out: str) -> None:
    """Raise a ValueError for empty names, and for an `out` at a URL or among the images."""
    for name, value in {"images": images, "vae": vae, "out": out}.items():
        if not value.strip():
            raise ValueError(f"{name} is empty; is a variable of your script not set?")
    if remote.is_url(out):
        raise ValueError(f"out={out}: is a URL; give a folder, and upload it when it is finished")
    images = absolute(images)
    if os.path.isdir(images):
        with os.scandir(images) as entries:  # class folders may be links
            folders = [images, *(entry.path for entry in entries if entry.is_dir())]
        roots = {os.path.realpath(folder) for folder in folders}
        target = os.path.realpath(out)
        if any(os.path.commonpath([root, target]) == root for root in roots):
            raise ValueError(
                f"out={out}: lies in images={images}, of which it would become a part; choose a "
                "folder beside it"
            )


def absolute(images: str) -> str:
    """The same place from any folder."""
    return images if remote.is_url(images) else os.path.abspath(images)


def device_model() -> str:
    """Which kind of GPU or CPU this rank computes on, as far as it changes the bits."""
    if distributed.device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what computes, by package."""
    packages = ("torch", "diffusers", "numpy", "pillow")
    return {
        "dit_ds": dit_ds.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def default_threads(ranks_on_host: int) -> int:
    """Threads for each rank: as OMP_NUM_THREADS says, or the host's shared by its ranks."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, torch.get_num_threads() // ranks_on_host)


def find_batch_size(vae: AutoencoderKL, image_size: int, most: int) -> int:
    """The smallest of 1, 2, 4, ... 64 that encodes within 5 % as many images a second as the best.

    It stays within `most` and the device's memory, and tries none of which the one before took
    seconds: what such a batch gains is little.
    """
    rates: dict[int, float] = {}
    size = 1
    while size <= min(_LARGEST_BATCH, most):
        try:
            seconds = _seconds(vae, image_size, size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise ValueError(
                    f"image_size={image_size}: not even one image fits into the memory of "
                    f"{device_model()}; choose smaller images, or precision bf16"
                ) from None
            torch.cuda.empty_cache()
            break
        rates[size] = size / seconds
        if seconds > _LONG_SECONDS:
            break
        size *= 2
    return min(size for size, rate in rates.items() if rate >= _GOOD * max(rates.values()))


def _seconds(vae: AutoencoderKL, image_size: int, batch_size: int) -> float:
    images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
    latents.encode(vae, images)  # the first one also prepares
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        latents.encode(vae, images)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
