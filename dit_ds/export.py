"""Weights to sample with: the EMA of a run as one safetensors file with its description beside it.

`FILE.safetensors` holds the parameters under the published names; `FILE.json` everything needed to
use them: sizes of the model, scale and shift of the latents, class names, the diffusion. Weights
are put together from a checkpoint's ranges, so no engine is needed and any ZeRO stage will do.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dit_ds import archive, distributed, files, posthoc, restore
from dit_ds.checkpoint_index import Strict, fault_of
from dit_ds.manifest import image_shape
from dit_ds.models import DiT
from dit_ds.settings import Objective

FORMAT = 1
_MOST_ROWS = 40  # of a table of tensors

Shapes = dict[str, list[int]]
Size = Annotated[int, Field(gt=0, lt=2**31)]


class Sizes(Strict):
    """Arguments of `DiT`; older files leave the options out."""

    input_size: Size | tuple[Size, Size]
    patch_size: Size
    in_channels: Size
    hidden_size: Size
    depth: Size
    num_heads: Size
    num_classes: Size
    mlp_ratio: Annotated[float, Field(gt=0, lt=1000)]
    learn_sigma: bool
    qk_norm: bool = False
    rope: bool = False
    mlp: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    fp32_norms: bool = False

    @property
    def latent_size(self) -> tuple[int, int]:
        """(H, W) of the latents."""
        size = self.input_size
        return (size, size) if isinstance(size, int) else size


class Description(Strict):
    """What one must know to use the weights; the JSON file beside them.

    latent_shape: (C, H, W). image_size: pixels of the shorter side. vae: the name it was asked for
    by. ema_length: of the average, where it was made after the training; ema_decay: of the plain
    one. metrics: what was measured at this step. class_dropout_known: older files do not tell it,
    and what stands in the objective is the usual. Unknown of foreign weights: ema_decay, and where
    they are empty, vae_sha256 and dataset; then step and images_seen, which are 0, are too.
    """

    model: Sizes
    latent_shape: tuple[int, int, int]
    scaling_factor: Annotated[float, Field(gt=0)]
    shift_factor: float
    image_size: Size
    class_names: list[str]
    objective: Objective
    vae: str
    vae_sha256: str
    dataset: str
    step: Annotated[int, Field(ge=0)]
    images_seen: Annotated[int, Field(ge=0)]
    ema_length: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    metrics: dict[str, float] = {}
    class_dropout_known: bool = True
    format: int = FORMAT

    @pydantic.model_validator(mode="after")
    def _fit_each_other(self) -> Description:
        sizes = self.model
        if self.latent_shape != (sizes.in_channels, *sizes.latent_size):
            raise ValueError(f"the model is not of latents of {self.latent_shape}")
        if self.num_classes != sizes.num_classes:
            raise ValueError(f"the model is not of {self.num_classes} classes")
        if self.objective.name == "flow" and sizes.learn_sigma:
            raise ValueError("the model has a variance, which flow matching does not learn")
        return self

    def to_json(self) -> str:
        """What `describe` reads."""
        return json.dumps(self.model_dump(), indent=1) + "\n"

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W) of the images in pixels."""
        return image_shape(self.image_size, self.latent_shape)

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
            ValueError: the weights are not those of such a model, or not all numbers.
        """
        check_finite(self.state, f"step {self.about.step}")
        model = self.check(f"step {self.about.step}")
        model.load_state_dict(self.state, strict=True, assign=True)
        return model.to(device).eval()

    def check(self, source: str) -> DiT:
        """The described model on the meta device.

        Raises:
            ValueError: names `source`, and all tensors that are not those of such a model in
                float32.
        """
        model = _model(self.about, _shapes(self.state), source)
        if any(tensor.dtype != torch.float32 for tensor in self.state.values()):
            raise ValueError(f"{source}: its tensors are not all float32, as they were written")
        return model


def check_finite(state: dict[str, torch.Tensor], source: str) -> None:
    """Raise ValueError for weights with infinities or NaN, as of a training that diverged."""
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{source}: {len(broken)} of {len(state)} tensors hold infinities or NaN, the first is "
            f"{broken[0]}; take weights from before the training diverged"
        )


def from_run(run: Path, *, ema_length: float | None = None) -> Weights:
    """The EMA weights of a run's newest checkpoint; a collective.

    ema_length: not those of the plain EMA, but of one of this length (see `posthoc`).

    Raises:
        RankError: not a run directory, no checkpoint yet, none that is whole, or of another model
            than it says; or it has not what a length needs.
    """
    with distributed.agreed():
        if not run.is_dir():
            raise ValueError(f"{run}: no such folder; runs lie in runs/ as a rule")
    found = restore.newest(run / "checkpoints")
    if found is None:
        raise distributed.RankError(f"{run}: no checkpoint yet; train until the first one is saved")
    with distributed.agreed():
        about = _described(found).model_copy(update=_training(found))
        parameters = found.index.parameters
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        _model(about, shapes | archive.module_shapes(found), str(found.path))
        state = {name: tensor.float() for name, tensor in archive.unsharded(found).items()}
        if ema_length is not None:
            about = about.model_copy(update={"ema_length": ema_length, "ema_decay": None})
            return Weights(state | posthoc.average(found, run / "ema", ema_length), about)
        # Before the first step that was applied the average is the weights themselves.
        key = "ema" if "ema" in found.index.keys else archive.MASTER
        ranges = archive.Ranges(found)
        state |= {name: ranges.whole(key, name) for name in parameters}
    return Weights(state, about)


def save(weights: Weights, path: Path) -> None:
    """Write FILE.safetensors and FILE.json, each whole or not at all."""
    _check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.atomic_path(path) as temporary:
            save_file({k: v.contiguous() for k, v in weights.state.items()}, temporary)
    except SafetensorError as e:
        raise OSError(f"{path}: {e}") from e
    files.write_atomically(path.with_suffix(".json"), weights.about.to_json())


def load(path: Path) -> Weights:
    """Read what `save` wrote.

    Raises:
        ValueError: a file is missing or damaged, or the two do not fit each other.
    """
    _check_suffix(path)
    beside = path.with_suffix(".json")
    if path.is_file() and not beside.is_file():
        raise ValueError(
            f"{path}: its description {beside.name} is not beside it; copy both files that "
            "tools/export.py wrote, or give the run whose checkpoint this is"
        )
    try:
        state = load_file(path)
        about = describe(json.loads(beside.read_bytes()), str(beside))
    except OSError as e:
        raise ValueError(f"{path}: cannot read {e.filename or path}") from e
    except (ValueError, RecursionError, SafetensorError) as e:
        raise ValueError(f"{path}: damaged, or not of tools/export.py ({e!s:.300})") from e
    weights = Weights(state, about)
    weights.check(str(path))
    return weights


def _check_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: weights are a FILE.safetensors here; tools/export.py makes one of a .pt, of "
            "a folder and of a run"
        )


def describe(tree: Any, source: str) -> Description:
    """A description out of JSON; a ValueError names `source` and the fault."""
    if isinstance(tree, dict) and tree.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{source}: format {tree['format']!r:.20}, this version reads {FORMAT}")
    if isinstance(tree, dict) and "objective" not in tree and "num_timesteps" in tree:
        # As it stood before there was more than one objective.
        rest = {k: v for k, v in tree.items() if k != "num_timesteps"}
        objective = {"num_timesteps": tree["num_timesteps"]}
        tree = rest | {"objective": objective, "class_dropout_known": False}
    try:
        return Description.model_validate_json(json.dumps(tree))
    except pydantic.ValidationError as e:
        fault = fault_of(e)
        raise ValueError(f"{source}: not a description of weights ({fault})") from e


def _training(found: archive.Checkpoint) -> dict[str, Any]:
    """What the checkpoint tells of the training, beside the description."""
    decay = _setting(found, "optimizer", "ema_decay")
    known = isinstance(decay, float) and "ema" in found.index.keys
    return {"ema_decay": decay if known else None, "metrics": dict(found.index.metrics)}


def _described(found: archive.Checkpoint) -> Description:
    """The checkpoint's description; what those of older runs lack is in their configuration."""
    about = describe(found.index.about.get("weights"), str(found.path))
    dropout = _setting(found, "objective", "class_dropout")
    if about.class_dropout_known or not isinstance(dropout, float) or not 0 <= dropout <= 1:
        return about
    objective = about.objective.model_copy(update={"class_dropout": dropout})
    return about.model_copy(update={"objective": objective, "class_dropout_known": True})


def _setting(found: archive.Checkpoint, section: str, key: str) -> Any:
    """Of the run's configuration; None if it does not tell."""
    cfg = found.index.about.get("config")
    tree = cfg.get(section) if isinstance(cfg, dict) else None
    return tree.get(key) if isinstance(tree, dict) else None


def _model(about: Description, state: Shapes, source: str) -> DiT:
    """The described model on the meta device; a ValueError if `state` is not of its shapes.

    A description may come from anyone, so nothing is allocated by what it claims.
    """
    sizes = about.model
    num_tokens = math.prod(side // sizes.patch_size for side in sizes.latent_size)
    fault = f"{source}: the weights do not fit their description"
    try:
        # What even the meta device takes time and memory for.
        if sizes.depth > len(state):
            raise ValueError(f"{len(state)} tensors for {sizes.depth} blocks")
        if state.get("pos_embed") != [1, num_tokens, sizes.hidden_size]:
            raise ValueError(f"pos_embed is {state.get('pos_embed')}")
        with torch.device("meta"):
            model = DiT(**sizes.model_dump())
    except (RuntimeError, ArithmeticError, ValueError) as e:
        raise ValueError(f"{fault} ({e!s:.300})") from e
    if table := misfit(_shapes(model.state_dict()), state):
        raise ValueError(f"{fault}\n{table}")
    return model


def misfit(expected: Mapping[str, list[int] | None], found: Shapes) -> str:
    """A table of the tensors that are missing, unexpected or misshapen; empty if all fit.

    expected: with None for those of any shape.
    """
    rows = [f"missing     {n:<50} {s or ''}" for n, s in expected.items() if n not in found]
    rows += [f"unexpected  {n!s:<50.200} {s}" for n, s in found.items() if n not in expected]
    rows += [
        f"misshapen   {n:<50} {s}, expected {expected[n]}"
        for n, s in found.items()
        if n in expected and expected[n] not in (None, s)
    ]
    if len(rows) > _MOST_ROWS:
        rows[_MOST_ROWS:] = [f"and {len(rows) - _MOST_ROWS} more"]
    return "\n".join("  " + files.printable(row.rstrip()) for row in rows)


def _shapes(state: dict[str, torch.Tensor]) -> Shapes:
    return {name: list(tensor.shape) for name, tensor in state.items()}
