"""Sample grids during training: the averaged weights, the same noise every time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_ds import distributed, latents, samplers, zero
from dit_ds.ddpm import DDPM
from dit_ds.manifest import Manifest
from dit_ds.objectives import Objective
from dit_ds.settings import Config

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Preview:
    """Samples on all ranks, each its slice, and decodes on rank 0.

    Raises:
        ValueError: previews are asked for and the VAE cannot be loaded or has other latents than
            the data, or settings do not fit the objective.
    """

    def __init__(self, cfg: Config, manifest: Manifest, objective: Objective) -> None:
        self._cfg, self._manifest, self._objective = cfg, manifest, objective
        self._classes = min(cfg.preview.classes, manifest.num_classes)
        self.columns = cfg.preview.per_class
        """Images of a row; each row is a class."""
        self._vae: AutoencoderKL | None = None
        self._settings = samplers.SamplerSettings(
            sampler=cfg.preview.sampler or ("ddim" if isinstance(objective, DDPM) else "euler"),
            steps=cfg.preview.steps,
            cfg_scale=cfg.preview.cfg_scale,
            seed=cfg.seed,
            batch_size=cfg.train.micro_batch_size,
        )
        if cfg.preview.every or cfg.preview.sampler:
            try:
                samplers.check(self._settings, objective, latent_shape=manifest.latent_shape)
            except ValueError as e:
                raise ValueError(f"preview.{e}") from None
        if cfg.preview.every and distributed.is_main():
            self._vae = self._load_vae(cfg.preview.vae or manifest.vae.name)

    def _load_vae(self, name: str) -> AutoencoderKL:
        try:
            vae = latents.load_vae(name, device=distributed.device())
            found = latents.latent_shape(vae, self._manifest.image_shape)
        except ValueError as e:
            raise ValueError(
                f"preview.vae={name}: {e}; give its folder, or preview.every=0 for no pictures"
            ) from e
        if found != self._manifest.latent_shape:
            raise ValueError(
                f"preview.vae={name} has latents of {found}, the data {self._manifest.latent_shape}"
                "; give the VAE that the data was made with"
            )
        return vae

    def due(self, step: int) -> bool:
        """Whether a grid is wanted after this step."""
        return self._cfg.preview.every > 0 and step % self._cfg.preview.every == 0

    def images(self, engine: Any) -> np.ndarray | None:
        """(N, H, W, 3) uint8 on rank 0, class after class; None elsewhere. A collective.

        Leaves the weights bitwise as they were.

        Raises:
            RankError: they could not be decoded.
        """
        rank, world = distributed.rank(), distributed.world_size()
        total = self._classes * self.columns
        # At stage 3 every forward pass is a collective, so all ranks sample equally many.
        each = -(-total // world)
        ids = torch.arange(rank * each, (rank + 1) * each) % total
        engine.eval()
        try:
            with zero.averaged_weights(engine):
                mine = samplers.sample(
                    engine,
                    self._objective,
                    self._settings,
                    classes=ids // self.columns,
                    latent_shape=self._manifest.latent_shape,
                    image_ids=ids.tolist(),
                    device=distributed.device(),
                    progress=False,
                )
        finally:
            engine.train()
        z = torch.cat(distributed.gather_tensor(mine))[:total]
        images = None
        # Decoding alone may fail and be left out: what fails while the averages stand in the place
        # of the weights, or between collectives, must end the training.
        with distributed.agreed():
            if self._vae is not None:
                factors = self._manifest.scaling_factor, self._manifest.shift_factor
                space, parts = latents.LatentSpace(*factors), z.split(self._settings.batch_size)
                images = np.concatenate([latents.decode(self._vae, p, space) for p in parts])
        return images
