"""The loss on other data during training: the same samples, noise and timesteps every time.

Each sample stands at the same place of the same batch whatever the number of ranks, and the mean is
taken in the order of the samples, so the figure does not depend on how many there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dit_ds import beats, distributed, zero
from dit_ds.manifest import Manifest, Store
from dit_ds.samples import MicroBatch, Samples
from dit_ds.settings import Config


class Validation:
    """Evaluates the weights as they are and their average; a collective, on every rank alike.

    losses: the names of the objective's losses.

    Raises:
        ValueError: the data do not fit the training's, or are part of them.
    """

    def __init__(
        self, cfg: Config, store: Store, training: Manifest, losses: tuple[str, ...]
    ) -> None:
        self._cfg, self._losses = cfg, losses
        manifest = store.manifest()
        store.check(manifest)
        where = f"validation.path={cfg.validation.path}"
        for name in ("latent_shape", "class_names", "scaling_factor", "shift_factor", "vae"):
            mine, theirs = getattr(manifest, name), getattr(training, name)
            if name == "vae":
                mine, theirs = mine.sha256, theirs.sha256
            if mine != theirs:
                raise ValueError(
                    f"{where} has another {name} than data.path={cfg.data.path}; give a part of "
                    "the same data, as `tools/shards.py split` makes it"
                )
        # An index may pick other rows of the same tar.
        others = {(s.sha256, s.index_sha256) for s in training.shards}
        shared = [s.name for s in manifest.shards if (s.sha256, s.index_sha256) in others]
        if shared:
            raise ValueError(
                f"{where} and data.path={cfg.data.path} share {len(shared)} shards (first: "
                f"{shared[0]});"
                " what is trained on cannot validate; `tools/shards.py split` makes two parts"
            )
        self._num_samples = manifest.num_samples
        self._samples = Samples(store, manifest, seed=cfg.seed, flip=0.0)

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step: at intervals, and at the end."""
        return step % self._cfg.validation.every == 0 or step == self._cfg.train.steps

    def losses(
        self, engine: Any, loss: Callable[[Any, MicroBatch], dict[str, torch.Tensor]]
    ) -> dict[str, float]:
        """Mean of each loss over all samples, of the weights and of their average (`ema`).

        `loss` gives the losses (N,) of a model on a batch. Leaves the weights bitwise as they were.

        Raises:
            RankError: a shard is damaged, on every rank.
        """
        values: dict[str, float] = {}
        engine.eval()
        try:
            for name, weights in (
                ("validation", contextlib.nullcontext()),
                ("validation_ema", zero.averaged_weights(engine)),
            ):
                with weights, torch.no_grad():
                    means = self._means(engine, loss)
                values |= {f"{name}/{k}": m for k, m in zip(self._losses, means, strict=True)}
        finally:
            engine.train()
        return values

    def _means(
        self, engine: Any, loss: Callable[[Any, MicroBatch], dict[str, torch.Tensor]]
    ) -> list[float]:
        rank, world = distributed.rank(), distributed.world_size()
        size = self._cfg.train.micro_batch_size
        num_batches = -(-self._num_samples // size)
        # At stage 3 every forward pass is a collective, so all ranks compute equally many.
        rounds = -(-num_batches // world)
        found = torch.zeros(rounds, len(self._losses), size)
        for i in range(rounds):
            beats.beat("sample", doing=f"validation, batch {i + 1} of {rounds}")
            first = min(rank * rounds + i, num_batches - 1) * size
            ids = np.arange(first, min(first + size, self._num_samples))
            with distributed.agreed():
                batch = self._samples.read_fixed(ids, size).to(distributed.device())
            losses = loss(engine, batch)
            found[i] = torch.stack([losses[k] for k in self._losses]).cpu()
        # (batches, losses, size), of which the last ones only fill up.
        everyone = torch.cat(distributed.gather_tensor(found))
        by_sample = everyone.transpose(0, 1).flatten(1)[:, : self._num_samples]
        return by_sample.double().mean(1).tolist()
