"""What one watches: TensorBoard, metrics.jsonl, a progress bar, and sample grids.

Losses are added up on the device and fetched only when they are logged, so that watching does not
slow the training. Rank 0 writes; the sums come from all ranks.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dit_ds import distributed, files, latents
from dit_ds.loader import Loader
from dit_ds.samples import MicroBatch
from dit_ds.settings import Config

_TIME_BINS = 4


class Monitor:
    """Rates, losses and pictures of one run; construct and call it on every rank alike.

    Args:
        run: the run directory.
        config: of the run.
        losses: the names of the objective's losses.
        step: steps done already; what was logged after it, by a run that was killed, is dropped.
    """

    def __init__(self, run: Path, config: Config, losses: tuple[str, ...], *, step: int) -> None:
        self._config, self._losses = config, losses
        self._samples = run / "samples"
        self._sums = torch.zeros(len(losses) + 1, device=distributed.device())
        self._bins = torch.zeros(2, _TIME_BINS, device=distributed.device())
        self._last_step, self._last_time, self._last_wait = step, time.perf_counter(), 0.0
        self._main = distributed.is_main()
        with distributed.agreed():
            if self._main:
                _drop_after(run / "metrics.jsonl", step)
                self._metrics = open(run / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
                board = str(run / "tensorboard")
                self._board = SummaryWriter(board, purge_step=step + 1, flush_secs=10)
        if self._main:
            self._bar = tqdm(
                total=config.train.steps,
                initial=step,
                unit="step",
                disable=None,  # only on a terminal
                file=sys.stdout,
            )

    def add(self, losses: dict[str, torch.Tensor], batch: MicroBatch, num_timesteps: int) -> None:
        """Count the per-sample losses of a micro-batch; nothing waits for the device."""
        w = batch.weight
        rows = torch.stack([losses[k].detach() for k in self._losses] + [torch.ones_like(w)])
        self._sums += (rows * w).sum(1)
        bins = (losses["t"] * _TIME_BINS // num_timesteps).long().clamp(max=_TIME_BINS - 1)
        self._bins[0].index_add_(0, bins, losses["loss"].detach() * w)
        self._bins[1].index_add_(0, bins, w)

    def log(self, engine: Any, loader: Loader, *, step: int, images_seen: int, lr: float) -> None:
        """Every `train.log_every` steps: means since the last time, on all channels; a collective.

        A process's first rates include its start.
        """
        if self._main:
            self._bar.update(step - self._bar.n)
        if step % self._config.train.log_every and step != self._config.train.steps:
            return
        sums = distributed.reduce_sum(torch.cat([self._sums, self._bins.flatten()]))
        memory = distributed.reduce_max(_peak_memory())
        self._sums.zero_()
        self._bins.zero_()
        now = time.perf_counter()
        seconds, steps = now - self._last_time, step - self._last_step
        waited = loader.wait_seconds - self._last_wait
        self._last_step, self._last_time, self._last_wait = step, now, loader.wait_seconds
        if not self._main:
            return
        count = sums[len(self._losses)]
        values = {k: (sums[i] / count).item() for i, k in enumerate(self._losses)}
        binned, counts = sums[len(self._losses) + 1 :].view(2, _TIME_BINS)
        for i in range(_TIME_BINS):
            if counts[i]:
                low, high = i / _TIME_BINS, (i + 1) / _TIME_BINS
                values[f"loss_by_time/{low:.2f}-{high:.2f}"] = (binned[i] / counts[i]).item()
        rate = steps * self._config.train.global_batch_size / seconds
        values |= {
            "gradient_norm": float(engine.get_global_grad_norm() or 0.0),
            "lr": lr,
            "images_per_second": rate,
            "data_wait_share": waited / seconds,
            "memory_gib": memory,
            "skipped_steps": float(engine.skipped_steps),
        }
        if engine.fp16_enabled():
            values["loss_scale"] = float(engine.optimizer.loss_scale)
        self.add_scalars(values, step=step, images_seen=images_seen)
        told = f"loss {values['loss']:.4f}  {rate:.0f} img/s"
        if self._bar.disable:
            left = (self._config.train.steps - step) * seconds / steps
            norm = values["gradient_norm"]
            total = self._config.train.steps
            distributed.print_main(
                f"step {step}/{total}  {told}  gradient norm {norm:.3f}  lr {lr:.2e}  "
                f"{tqdm.format_interval(int(left))} left"
            )
        else:
            self._bar.set_postfix_str(told)

    def add_scalars(self, values: dict[str, float], *, step: int, images_seen: int) -> None:
        """A line of metrics.jsonl, and a point on each of TensorBoard's curves, from rank 0."""
        if not self._main:
            return
        line: dict[str, float | None] = {"step": step, "images": images_seen}
        # JSON knows no infinity, the norm of a step that was skipped.
        line |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self._tolerating_a_full_disk():
            self._metrics.write((json.dumps(line) + "\n").encode())
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def show(self, images: np.ndarray | None, *, columns: int, step: int) -> None:
        """A grid of (N, H, W, 3) uint8 images, as PNG and in TensorBoard, on the rank with them."""
        if images is None:
            return
        sheet = latents.image_grid(images, rows=-(-len(images) // columns), columns=columns)
        with self._tolerating_a_full_disk():
            self._samples.mkdir(exist_ok=True)
            sheet.save(self._samples / f"step-{step:08d}.png")
            self._board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    @contextlib.contextmanager
    def _tolerating_a_full_disk(self) -> Iterator[None]:
        """Watching must not end the training: what cannot be written is told, and left out."""
        try:
            yield
        except OSError as e:
            self.say(f"WARNING: metrics or samples could not be written: {e}")

    def pause(self, seconds: float) -> None:
        """Leave time that is not training (a save, a preview) out of the rates."""
        self._last_time += seconds

    def say(self, message: str) -> None:
        """Print a line on rank 0 without breaking the progress bar."""
        if self._main and not self._bar.disable:
            self._bar.write(message)
            sys.stdout.flush()
        else:
            distributed.print_main(message)

    def warn(self, message: str) -> None:
        """Say what must not be missed, and show it in TensorBoard's text."""
        if self._main:
            self._bar.clear()
            distributed.warn_main(message)
            with self._tolerating_a_full_disk():
                self._board.add_text("warnings", message, self._bar.n)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        """Write out what is still in buffers."""
        if self._main:
            self._bar.close()
            with self._tolerating_a_full_disk():
                self._board.close()
                self._metrics.close()


def _peak_memory() -> float:
    """GiB: most that was allocated on the GPU, or most resident memory where there is none."""
    if distributed.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _drop_after(path: Path, step: int) -> None:
    """Cut off what a killed run logged after the step that training goes on from."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short
    files.write_atomically(path, "".join(kept))
