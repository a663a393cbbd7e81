"""How good digits get, by recipe, optimizer and number of images: the quickstart, many times.

Everything is made in a work folder and kept there, so that the same command goes on where it was
stopped: images, VAE and latents as `launch/quickstart.sh` makes them; trainings, each of one rank
and one thread through `dit_ds.train`, as many side by side as there are cores; a score for each
checkpoint that is asked about. Trainings of a seed see the same images in the same order.

Run by `tools/benchmark.py digits`, `optimizers` and `sophia`; figures stand in tools/BENCHMARKS.md.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_ds import config, digits, distributed, files, latents, objectives, train, zero
from dit_ds.archive import Checkpoint, Ranges, folder_name, unsharded
from dit_ds.curvature import Curvature
from dit_ds.export import Description, Weights
from dit_ds.extract import extract
from dit_ds.loader import Loader, Split
from dit_ds.manifest import Folder, Manifest
from dit_ds.rundir import describe
from dit_ds.samplers import SamplerSettings, sample
from dit_ds.sampling import objective_of

BATCH = 32
STEPS = {"published": 2000, "modern": 1000}
"""The quickstart's, with half its batch; and half of them."""
STEPS_OF_OPTIMIZERS = 1000
PER_CLASS = 90
"""Images of a score: 900."""
SCORED_BY = SamplerSettings(sampler="dpm++", steps=20, batch_size=300)
"""For all alike: of both objectives, without guidance, with the same noise."""


@dataclass(frozen=True)
class Variant:
    """A recipe with overrides, and the learning rates among which the best is looked for."""

    recipe: str
    overrides: tuple[str, ...] = ()
    tried: tuple[float, ...] = (3e-3,)


VARIANTS = {
    "published": Variant("quickstart", tried=(3e-3, 6e-3)),
    "modern": Variant("quickstart-modern", tried=(3e-3, 6e-3)),
    "sophiag": Variant(
        "quickstart",
        ("optimizer.name=sophiag", "optimizer.betas=[0.965,0.99]"),
        tried=(3e-4, 1e-3, 3e-3),
    ),
    "sophiag-rho0.1": Variant(
        "quickstart",
        ("optimizer.name=sophiag", "optimizer.betas=[0.965,0.99]", "optimizer.rho=0.1"),
        tried=(1e-3, 3e-3),
    ),
}
LR = 3e-3
"""Of both recipes."""


@dataclass(frozen=True)
class Training:
    """One run: a variant at a learning rate, from a seed."""

    variant: str
    lr: float
    steps: int
    seed: int

    @property
    def saved(self) -> tuple[int, ...]:
        """Steps after which it is saved."""
        return tuple(self.steps * quarter // 4 for quarter in range(1, 5))

    def run(self, work: Path) -> Path:
        """Its run directory."""
        return work / "runs" / f"{self.variant}-lr{self.lr:g}-{self.steps}-{self.seed}"

    def settings(self, work: Path) -> tuple[str, list[str]]:
        """Its recipe and the overrides."""
        variant = VARIANTS[self.variant]
        return variant.recipe, [
            *variant.overrides,
            *(f"optimizer.lr={self.lr:g}", f"seed={self.seed}", f"data.path={work / 'latents'}"),
            *("data.workers=0", "preview.every=0", f"train.steps={self.steps}"),
            *(f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}"),
            *(f"train.checkpoint_every={self.saved[0]}", "train.keep_checkpoints=4"),
        ]

    def command(self, work: Path) -> list[str]:
        """What trains it, or goes on with it."""
        recipe, overrides = self.settings(work)
        return [
            *(sys.executable, "-m", "dit_ds.train", "--config", recipe),
            *("--run", str(self.run(work)), "--deepspeed_config", str(work / "ds_config.json")),
            *overrides,
        ]


def digits_learned(work: Path, *, repeats: int = 3) -> dict[str, float]:
    """Frechet distance to real digits by recipe and number of images, the learning rates tuned."""
    return _tuned(
        work,
        {
            name: [Training(name, lr, steps, 0) for lr in VARIANTS[name].tried]
            for name, steps in STEPS.items()
        },
        repeats,
    )


def optimizers(work: Path, *, repeats: int = 3) -> dict[str, float]:
    """AdamW ("published") and Sophia-G, the learning rate of both and Sophia's rho tuned."""
    steps = STEPS_OF_OPTIMIZERS
    adamw = [Training("published", lr, steps, 0) for lr in (1e-3, 3e-3, 6e-3, 1.2e-2)]
    sophia = [
        Training(name, lr, steps, 0)
        for name in ("sophiag", "sophiag-rho0.1")
        for lr in VARIANTS[name].tried
    ]
    return _tuned(work, {"adamw": adamw, "sophiag": sophia}, repeats)


def _tuned(work: Path, tried: dict[str, list[Training]], repeats: int) -> dict[str, float]:
    """The last distance of each that is tried on seed 0; the best of a name from all seeds."""
    train_all(work, list(itertools.chain.from_iterable(tried.values())))
    vae = latents.load_vae(work / "vae")
    found: dict[str, float] = {}
    best: dict[str, list[Training]] = {}
    for name, trainings in tried.items():
        last = {t: score(work, t, t.steps, vae)["frechet_distance"] for t in trainings}
        found |= {f"tried_{t.variant}_lr_{t.lr:g}": distance for t, distance in last.items()}
        first = min(last, key=last.__getitem__)
        best[name] = [dataclasses.replace(first, seed=seed) for seed in range(repeats)]
    return found | _compared(work, best)


def _compared(work: Path, trainings: dict[str, list[Training]]) -> dict[str, float]:
    """Each after half its images and after all: distances, and digits read as asked."""
    train_all(work, list(itertools.chain.from_iterable(trainings.values())))
    vae = latents.load_vae(work / "vae")
    found: dict[str, float] = {}
    for name, seeds in trainings.items():
        for step in tqdm(seeds[0].saved[1::2], desc=name, disable=None, leave=False):
            found |= summary(f"{name}_{step * BATCH}", [score(work, t, step, vae) for t in seeds])
    return found


def summary(name: str, scores: list[dict[str, float]]) -> dict[str, float]:
    """Scores of several seeds as means, with the least and the largest distance."""
    distances = [s["frechet_distance"] for s in scores]
    return {
        name: statistics.mean(distances),
        f"{name}_from": min(distances),
        f"{name}_to": max(distances),
        f"{name}_read": statistics.mean(s["class_accuracy"] for s in scores),
    }


def prepare(work: Path) -> None:
    """Images, VAE, latents and the DeepSpeed JSON in `work`, each unless it is there."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "images").exists():
        digits.write_images(work / "images")
    if not (work / "vae").exists():
        digits.run_vae(digits.parse(["vae", *_paths(work, "images"), "--out", str(work / "vae")]))
    if not (work / "latents" / "manifest.json").exists():
        extract(str(work / "images"), str(work / "vae"), 8, str(work / "latents"))
    files.write_atomically(work / "ds_config.json", '{"zero_optimization": {"stage": 2}}\n')


def _paths(work: Path, name: str) -> list[str]:
    return [f"--{name}", str(work / name)]


def train_all(work: Path, trainings: list[Training]) -> None:
    """Train what is not trained yet, one for each core at a time.

    Raises:
        ValueError: a training failed; its log is named.
    """
    prepare(work)
    left = [t for t in trainings if not (checkpoint(work, t, t.steps) / "index.json").is_file()]
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(left), desc="training", disable=None, leave=False) as bar,
    ):
        for _ in pool.map(lambda t: _train(work, t), left):
            bar.update()


def _train(work: Path, training: Training) -> None:
    run = training.run(work)
    log = run.with_name(f"{run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("a") as file:
        command = training.command(work)
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ValueError(f"{training} failed: the end of {log} says why; the same command goes on")


def checkpoint(work: Path, training: Training, step: int) -> Path:
    """Where the one of this step is once it is written."""
    return training.run(work) / "checkpoints" / folder_name(step)


def averaged(path: Path) -> Weights:
    """The EMA of a checkpoint."""
    found = Checkpoint.open(path)
    about = Description.model_validate_json(json.dumps(found.index.about["weights"]))
    ranges = Ranges(found)
    averages = {name: ranges.whole("ema", name) for name in found.index.parameters}
    return Weights(unsharded(found) | averages, about)


def score(
    work: Path,
    training: Training,
    step: int,
    vae: Any,
    settings: SamplerSettings = SCORED_BY,
) -> dict[str, float]:
    """The quickstart's report on 900 digits of a checkpoint; kept in `work`."""
    how = f"{settings.sampler}-{settings.steps}"
    kept = work / "scores" / f"{training.run(work).name}-{step}-{how}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    weights = averaged(checkpoint(work, training, step))
    about, asked = weights.about, torch.arange(digits.NUM_CLASSES).repeat_interleave(PER_CLASS)
    z = sample(
        weights.build(),
        objective_of(about),
        settings,
        classes=asked,
        latent_shape=about.latent_shape,
        progress=False,
    )
    space = latents.LatentSpace(about.scaling_factor, about.shift_factor)
    images, labels = digits.read_images(work / "images")
    report = digits.make_report(images, labels, latents.decode(vae, z, space), asked.numpy(), vae)
    kept.parent.mkdir(exist_ok=True)
    files.write_atomically(kept, json.dumps(report) + "\n")
    return report


def sophia_cost(work: Path, *, repeats: int = 3) -> dict[str, float]:
    """Time of Sophia-G's step over AdamW's, and bytes of state for each parameter.

    `repeats` turns, of 10 steps of each on the same images, one of Sophia's with an estimate of the
    curvature; the medians.
    """
    prepare(work)
    torch.set_num_threads(1)
    distributed.init()
    manifest = Manifest.load(str(work / "latents"))
    found: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    ways = {name: _Stepping(work, manifest, name) for name in ("published", "sophiag")}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way.ten_steps()
            if turn:  # the first makes state and kernels
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    for name, way in ways.items():
        found[f"{name}_step_seconds"] = statistics.median(seconds[name]) / 10
        found[f"{name}_bytes_of_state"] = way.bytes_of_state()
    ratios = [s / a for s, a in zip(seconds["sophiag"], seconds["published"], strict=True)]
    return found | {"sophiag_over_adamw": statistics.median(ratios)}


class _Stepping:
    """An engine on one batch of digits."""

    def __init__(self, work: Path, manifest: Manifest, name: str) -> None:
        recipe, overrides = Training(name, LR, STEPS_OF_OPTIMIZERS, 0).settings(work)
        cfg, ds_config = config.load(recipe, overrides), {"zero_optimization": {"stage": 2}}
        split = Split.of(global_batch=BATCH, world_size=1, micro_batch=BATCH)
        model = describe(cfg, ds_config, manifest)["weights"]["model"]
        self.engine = train.build_engine(cfg, ds_config, split, model)
        self.objective = objectives.build(
            cfg.objective,
            num_classes=manifest.num_classes,
            learn_sigma=cfg.model.learn_sigma,
            latent_shape=manifest.latent_shape,
        )
        self.space = latents.LatentSpace(manifest.scaling_factor, manifest.shift_factor)
        folder = Folder(str(work / "latents"))
        common: dict[str, Any] = {
            "lanes": cfg.lanes,
            "window": 16,
            "seed": 0,
            "flip": 0.0,
            "workers": 0,
        }
        with Loader(folder, manifest, split, first_step=0, last_step=1, **common) as loader:
            (self.micro,) = loader.next()
        self.curvature = cfg.optimizer.hessian_every and Curvature(
            self.engine,
            every=cfg.optimizer.hessian_every,
            seed=0,
            probe=lambda model, micro, normals: self.objective.probe(
                model, self._latents(), micro, normals
            ),
            channels=2 * manifest.latent_shape[0],
        )

    def _latents(self) -> torch.Tensor:
        return self.space.sample(self.micro.moments, self.micro.posterior)

    def ten_steps(self) -> None:
        """As the training makes them."""
        for step in range(10):
            if self.curvature and self.curvature.due(step):
                self.curvature.estimate(self.micro)
            loss = self.objective.loss(self.engine, self._latents(), self.micro)["loss"].mean()
            self.engine.backward(loss, scale_wrt_gas=False)
            self.engine.step()

    def bytes_of_state(self) -> float:
        """Of the optimizer, for each parameter, the weights aside."""
        optimizer = zero.client_optimizer(self.engine)
        num_bytes = sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if value.ndim
        )
        return num_bytes / sum(p.numel() for p in self.engine.module.parameters())
