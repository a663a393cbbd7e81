"""Weights to sample with: the EMA of a run as one safetensors file with its description beside it.

`FILE.safetensors` holds the parameters under the published names; `FILE.json` everything needed to
use them: sizes of the model, scale and shift of the latents, class names, the diffusion. Weights
are put together from a checkpoint's ranges, so no engine is needed and any ZeRO stage will do.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dit_ds import archive, distributed, files, restore
from dit_ds.models import DiT

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Description:
    """What one must know to use the weights; the JSON file beside them.

    model: arguments of `DiT`. latent_shape: (C, H, W). vae: the name it was asked for by.
    """

    model: dict[str, Any]
    latent_shape: tuple[int, int, int]
    scaling_factor: float
    shift_factor: float
    image_size: int
    class_names: list[str]
    num_timesteps: int
    vae: str
    vae_sha256: str
    dataset: str
    step: int
    images_seen: int
    format: int = FORMAT

    @property
    def num_classes(self) -> int:
        """Number of classes; the null class is the one after the last."""
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A state dict in the published layout (float32) and its description."""

    state: dict[str, torch.Tensor]
    about: Description

    def build(self, device: torch.device | str = "cpu") -> DiT:
        """The model with these weights, in evaluation mode.

        Raises:
            ValueError: the weights are not those of such a model.
        """
        sizes = self.about.model
        try:
            # Looked at before anything is built: a description may come from anyone.
            side = sizes["input_size"] // sizes["patch_size"]
            if self.state["pos_embed"].shape != (1, side * side, sizes["hidden_size"]):
                raise ValueError("pos_embed is of another size")
            if sizes["depth"] > len(self.state):
                raise ValueError("there are fewer tensors than blocks")
            with torch.device("meta"):
                model = DiT(**sizes)
            model.load_state_dict(self.state, strict=True, assign=True)
        except (RuntimeError, TypeError, KeyError, ArithmeticError, ValueError) as e:
            raise ValueError(f"the weights do not fit their description: {e}") from e
        return model.to(device).eval()


def from_run(run: Path) -> Weights:
    """The EMA weights of a run's newest checkpoint; a collective.

    Raises:
        RankError: not a run directory, no checkpoint yet, or none that is whole.
    """
    with distributed.agreed():
        if not run.is_dir():
            raise ValueError(f"--run {run}: no such folder; runs lie in runs/ as a rule")
    found = restore.newest(run / "checkpoints")
    if found is None:
        raise distributed.RankError(
            f"--run {run}: no checkpoint yet; train until the first one is saved"
        )
    ranges = archive.Ranges(found)
    state = dict(archive.unsharded(found))
    # Before the first step that was applied the average is the weights themselves.
    key = "ema" if "ema" in found.index.keys else archive.MASTER
    for name in found.index.parameters:
        state[name] = ranges.whole(key, name)
    state = {name: tensor.float() for name, tensor in state.items()}
    return Weights(state, _description(found.index.about.get("weights"), str(found.path)))


def save(weights: Weights, path: Path) -> None:
    """Write FILE.safetensors and FILE.json, each whole or not at all."""
    _check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.atomic_path(path) as temporary:
            save_file({k: v.contiguous() for k, v in weights.state.items()}, temporary)
    except SafetensorError as e:
        raise OSError(f"{path}: {e}") from e
    about = json.dumps(dataclasses.asdict(weights.about), indent=1) + "\n"
    files.write_atomically(path.with_suffix(".json"), about)


def load(path: Path) -> Weights:
    """Read what `save` wrote.

    Raises:
        ValueError: a file is missing or damaged, or the two do not fit each other.
    """
    _check_suffix(path)
    beside = path.with_suffix(".json")
    try:
        about = _description(json.loads(beside.read_text()), str(beside))
        state = load_file(path)
    except OSError as e:
        raise ValueError(f"--weights {path}: cannot read {e.filename or path}") from e
    except (json.JSONDecodeError, SafetensorError) as e:
        raise ValueError(f"--weights {path}: damaged ({e})") from e
    return Weights(state, about)


def _check_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are one .safetensors file; give that name")


def _description(tree: Any, source: str) -> Description:
    try:
        about = Description(**tree)
    except TypeError as e:
        raise ValueError(f"{source}: not a description of weights ({e})") from e
    if about.format != FORMAT:
        raise ValueError(f"{source}: format {about.format}, this version reads {FORMAT}")
    return dataclasses.replace(about, latent_shape=tuple(about.latent_shape))  # type: ignore[arg-type]
