"""Folders of a diffusers `DiTPipeline`: transformer, VAE, scheduler, and the description of ours.

    model_index.json    what the pipeline is made of, with the names of the classes
    transformer/        of class `dit_ds.diffusers_model.PublishedDiT`, or diffusers' own
    vae/, scheduler/    as diffusers saves them
    dit_ds.json         the `export.Description`
    README.md           the model card

diffusers' own class is exact only for chosen timesteps: see `fold_timesteps`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit_ds import card, export, files, latents, layouts, published
from dit_ds.checkpoint_index import fault_of
from dit_ds.export import Description, Weights
from dit_ds.layouts import State, Unsaid
from dit_ds.models import sincos_pos_embed, timestep_embedding
from dit_ds.settings import Objective

DESCRIPTION, FOLDED = "dit_ds.json", "dit_ds_timesteps.json"
_WEIGHTS = "diffusion_pytorch_model"
_ALWAYS = "_class_name", "_diffusers_version"  # in a config of diffusers
_MOST_PATCHES = 256
"""Of each side: the position embedding may have to be computed, and no tensor tells its size."""

_Size = Annotated[int, Field(gt=0, lt=2**20)]


class _Told(pydantic.BaseModel):
    """What is read of a JSON file that diffusers writes; the rest of it may be anything."""

    model_config = pydantic.ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class _Transformer(_Told):
    class_name: str = Field("", alias="_class_name")
    num_attention_heads: _Size
    attention_head_dim: _Size
    sample_size: _Size
    patch_size: _Size
    num_embeds_ada_norm: _Size
    num_classes: _Size | None = None
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    attention_bias: Literal[True] = True
    norm_elementwise_affine: Literal[False] = False

    @pydantic.model_validator(mode="after")
    def _patches(self) -> _Transformer:
        patches, rest = divmod(self.sample_size, self.patch_size)
        if rest or patches > _MOST_PATCHES:
            raise ValueError(
                f"sample_size {self.sample_size} is not 1 to {_MOST_PATCHES} patches of "
                f"{self.patch_size}"
            )
        return self

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class _VAE(_Told):
    scaling_factor: Annotated[float, Field(gt=0)] | None = None


class _Scheduler(_Told):
    num_train_timesteps: Annotated[int, Field(ge=2, le=1_000_000)] = 1000
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"

    @property
    def objective(self) -> Objective:
        return Objective(
            num_timesteps=self.num_train_timesteps,
            prediction="v" if self.prediction_type == "v_prediction" else "eps",
            schedule="linear" if self.beta_schedule == "linear" else "cosine",
        )


_Read = TypeVar("_Read", bound=_Told)


def save(
    weights: Weights, folder: Path, *, vae: str | None = None, num_steps: int | None = None
) -> None:
    """Write the folder, whole or not at all.

    Args:
        weights: of a model and an objective that diffusers' can express.
        folder: new, or empty.
        vae: the decoder, a folder or a hub id; that of the description unless given.
        num_steps: for diffusers' own class, exact at so many steps of the scheduler only.

    Raises:
        ValueError: what cannot be expressed, the folder is not empty, or the VAE does not fit.
    """
    about, folder = weights.about, folder.resolve()
    layouts.check_expressed(about, folder, diffusers=True)
    most = about.objective.num_timesteps
    if num_steps is not None and not 1 <= num_steps <= most:
        raise ValueError(f"--stock-steps {num_steps} must be 1 to {most}, the steps of training")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--out {folder}: it is there already; name a new folder")
    if folder == Path.cwd():  # it is replaced, and a shell would be left in what is gone
        raise ValueError(f"--out {folder}: the working folder; name a new one, or go elsewhere")
    decoder, scheduler = latents.load_vae(vae or about.vae), _scheduler(about)
    found = latents.latent_shape(decoder, about.image_shape)
    if found != about.latent_shape:
        raise ValueError(
            f"--vae {vae or about.vae}: it makes latents of {found} of {about.image_shape} pixels, "
            f"the model's are {about.latent_shape}; give the training's VAE, or --image-size of a "
            ".pt alone"
        )
    state, timesteps = layouts.to_diffusers(weights.state), None
    if num_steps is not None:
        scheduler.set_timesteps(num_steps)
        timesteps = [int(t) for t in scheduler.timesteps]
        fold_timesteps(state, timesteps)
        del state["pos_embed.pos_embed"]
    transformer = _transformer(about, state, exact=num_steps is None)
    with _new_folder(folder) as temporary:
        transformer.save_pretrained(temporary / "transformer", max_shard_size="1000GB")
        if timesteps is None:  # what our class fixes, diffusers would warn of at each load
            path = temporary / "transformer" / "config.json"
            known = {*inspect.signature(type(transformer).__init__).parameters, *_ALWAYS}
            config = _read_json(path)
            _write_json(path, {k: v for k, v in config.items() if k in known})
        scheduler.save_pretrained(temporary / "scheduler")
        told = _vae_told(about, vae or about.vae, latents.vae_hash(decoder))
        decoder.register_to_config(scaling_factor=about.scaling_factor)
        decoder.save_pretrained(temporary / "vae")
        _write_json(temporary / "model_index.json", _index(about, transformer))
        num_parameters = sum(t.numel() for k, t in weights.state.items() if k != "pos_embed")
        text = card.model_card(
            about, num_parameters=num_parameters, vae_told=told, timesteps=timesteps
        )
        (temporary / "README.md").write_text(text)
        if timesteps is None:
            (temporary / DESCRIPTION).write_text(about.to_json())
        else:
            _write_json(temporary / FOLDED, timesteps)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that appears under its name when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        temporary = Path(place) / folder.name
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*.safetensors"):
            files.usual_permissions(path)
        temporary.replace(folder)  # one that is there is empty, or it would not have come to this


def load(folder: Path, unsaid: Unsaid) -> Weights:
    """Read such a folder, ours or one of diffusers' own class; `unsaid` for what it does not tell.

    Raises:
        ValueError: it is none, or damaged, or its weights are right for some timesteps only.
    """
    if (folder / FOLDED).exists():
        raise ValueError(
            f"{folder}: its weights are right for some timesteps only (they were exported with "
            "--stock-steps); import what it was made from"
        )
    state = _tensors(folder / "transformer")
    if (folder / DESCRIPTION).is_file():
        about = export.describe(_read_json(folder / DESCRIPTION), str(folder / DESCRIPTION))
        found = layouts.from_diffusers(state, about.num_classes, str(folder))
    else:
        about, found = _stranger(folder, state, unsaid)
    weights = Weights(found, about)
    weights.check(str(folder))
    return weights


def fold_timesteps(state: State, timesteps: list[int]) -> None:
    """Change the timestep MLP so that diffusers' own embedding gives the right vectors there.

    Both embeddings are 256 numbers; where there are fewer timesteps than that, and they can be told
    apart by diffusers', a linear map takes one to the other exactly. It goes into the first layer.

    Raises:
        ValueError: there are too many timesteps for it.
    """
    t = torch.tensor(timesteps, dtype=torch.float64)
    here = timestep_embedding(t).double()  # (N, 256), as our model computes it
    there = _diffusers_embedding(t)
    names = [name for name in state if name.endswith("timestep_embedder.linear_1.weight")]
    weight = state[names[0]]  # (D, 256)
    right = here @ weight.double().T  # (N, D)
    # Least norm: large weights of opposite sign would add up rounding errors in float32.
    folded = torch.linalg.lstsq(there, right, rcond=1e-9, driver="gelsd").solution.T.float()
    error = (there.float() @ folded.T - right.float()).abs().max().item()
    largest = right.abs().max().item()
    if error > 2e-5 * max(largest, 1.0):
        raise ValueError(
            f"--stock-steps {len(timesteps)}: the timestep embedding would be wrong by "
            f"{error:.1e}; choose fewer steps, up to about 80"
        )
    for name in names:
        state[name] = folded.clone()


def _diffusers_embedding(t: Tensor) -> Tensor:
    from diffusers.models.embeddings import get_timestep_embedding

    embedding: Tensor = get_timestep_embedding(
        t.float(), 256, flip_sin_to_cos=True, downscale_freq_shift=1
    )
    return embedding.double()


def _transformer(about: Description, state: State, *, exact: bool) -> Any:
    from diffusers import DiTTransformer2DModel

    from dit_ds.diffusers_model import PublishedDiT

    sizes = about.model
    (in_channels, side, _), channels = about.latent_shape, sizes.hidden_size // sizes.num_heads
    config = dict(
        num_attention_heads=sizes.num_heads,
        attention_head_dim=channels,
        in_channels=in_channels,
        out_channels=in_channels * (1 + sizes.learn_sigma),
        num_layers=sizes.depth,
        sample_size=side,
        patch_size=sizes.patch_size,
        num_embeds_ada_norm=max(sizes.num_classes, layouts.NULL_ROW),
    )
    with torch.device("meta"):
        if exact:
            model = PublishedDiT(**config, num_classes=sizes.num_classes)
        else:
            model = DiTTransformer2DModel(**config, norm_eps=1e-6)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _scheduler(about: Description) -> Any:
    """DDIM of diffusers on the training's schedule; linear betas go with the number of steps."""
    from diffusers import DDIMScheduler

    objective = about.objective
    scale = 1000 / objective.num_timesteps
    return DDIMScheduler(
        num_train_timesteps=objective.num_timesteps,
        beta_start=scale * 1e-4,
        beta_end=scale * 0.02,
        beta_schedule="squaredcos_cap_v2" if objective.schedule == "cosine" else "linear",
        prediction_type="v_prediction" if objective.prediction == "v" else "epsilon",
        clip_sample=False,
    )


def _index(about: Description, transformer: Any) -> dict[str, Any]:
    import diffusers

    kind = type(transformer)
    library = "diffusers" if kind.__module__.startswith("diffusers.") else kind.__module__
    labels = {str(layouts.row_of(i)): name for i, name in enumerate(about.class_names)}
    return {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": labels,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": [library, kind.__name__],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _vae_told(about: Description, name: str, sha256: str) -> str:
    if not about.vae_sha256:
        return f"`{name}`; whether the training data was made with it is unknown"
    if about.vae_sha256 == sha256:
        return f"`{about.vae}`, the one that the training data was made with"
    return "not the one that the training data was made with"


def _stranger(folder: Path, state: State, unsaid: Unsaid) -> tuple[Description, State]:
    """Of a folder of diffusers' own class: description and tensors.

    Its JSON may claim anything: nothing is computed before it agrees with the tensors.
    """
    config = _told(_Transformer, folder / "transformer" / "config.json")
    hidden_size, most = config.hidden_size, config.num_embeds_ada_norm
    # Ours has its null row where the pipeline looks for it, and rows that no class has.
    null = layouts.NULL_ROW if config.class_name == "PublishedDiT" else most
    names = unsaid.class_names or _names(folder)
    num_classes = config.num_classes or (len(names) if names else most)
    widths, labels = layouts.embeddings_there(state)
    if labels and (widths, labels) != (hidden_size, most + 1):
        raise ValueError(
            f"{folder}: its transformer/config.json tells {hidden_size} channels and {most} "
            f"classes, its tensors have {widths} and {labels} rows of labels"
        )
    found = layouts.from_diffusers(state, num_classes, str(folder), null_row=null)
    if "pos_embed" not in found:
        pos_embed = sincos_pos_embed(hidden_size, config.sample_size // config.patch_size)
        found["pos_embed"] = torch.from_numpy(pos_embed).unsqueeze(0)
    unsaid = dataclasses.replace(unsaid, class_names=names)
    about = layouts.describe(found, unsaid, str(folder), num_heads=config.num_attention_heads)
    if about.latent_shape[1] != config.sample_size:
        raise ValueError(
            f"{folder}: its transformer/config.json tells a sample_size of {config.sample_size}, "
            f"its tensors are those of {about.latent_shape[1]}"
        )
    vae, scheduler = folder / "vae" / "config.json", folder / "scheduler" / "scheduler_config.json"
    if vae.is_file():
        scale = _told(_VAE, vae).scaling_factor or about.scaling_factor
        about = about.model_copy(update={"scaling_factor": scale, "vae": str(vae.parent.resolve())})
    if scheduler.is_file():
        objective = _told(_Scheduler, scheduler).objective
        about = about.model_copy(update={"objective": objective})
    return about, found


def _names(folder: Path) -> Sequence[str] | None:
    """Names of all classes in a pipeline's model_index.json; None if it has not all of them."""
    index = folder / "model_index.json"
    told = _read_json(index).get("id2label") if index.is_file() else None
    if not isinstance(told, dict):
        return None
    rows = [str(layouts.row_of(i)) for i in range(len(told))]
    return [str(told[row]) for row in rows] if told.keys() == set(rows) else None


def _told(kind: type[_Read], path: Path) -> _Read:
    """What a stranger's JSON says; a ValueError names the file and the fault."""
    try:
        return kind.model_validate_json(json.dumps(_read_json(path)))
    except pydantic.ValidationError as e:
        raise ValueError(f"{path}: not that of a published DiT ({fault_of(e)})") from e


def _tensors(folder: Path) -> State:
    paths = sorted(folder.glob(f"{_WEIGHTS}*.safetensors"))
    if not paths and (folder / f"{_WEIGHTS}.bin").is_file():
        return published.tensors(folder / f"{_WEIGHTS}.bin")
    if not paths:
        raise ValueError(
            f"{folder}: no {_WEIGHTS}.safetensors; give a folder of a DiTPipeline that has it"
        )
    try:
        state = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{folder}: its weights are damaged or cannot be read ({e!s:.200})") from e
    return published.plain(state, folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: cannot be read ({e!s:.200})") from e
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not what diffusers writes")
    return tree


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n")
