"""A run's configuration: what the recipe owns (mathematics, batch, activation checkpointing).

A recipe is YAML, from `dit_ds/recipes` by name or any file by path; `section.key=value` on the
command line overrides it. What the DeepSpeed JSON owns (ZeRO, offload, communication, precision) is
refused here, and the other way round, with a sentence that names the owner. No torch here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

RECIPES = Path(__file__).parent / "recipes"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and the remedy."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which latents, in which order. Image size, channels and classes come with the data."""

    path: str = ""
    """Folder or URL (s3://, gs://, https://, hf://) of a `manifest.json`."""
    cache: str | None = None
    """Folder on this machine's disk for shards from a URL. Default ~/.cache/dit_ds."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Most that the cache may hold (10^9 bytes): two windows of this machine's lanes, and this
    machine's part of `validation.path` if that is at a URL too."""
    lanes: Positive | None = None
    """Parallel lanes of the order; divides the global batch. Default gcd(global batch, 64)."""
    window: Positive = 16
    """Shards of a lane whose samples are shuffled together."""
    flip: Probability = 0.5
    """Share of samples taken from the horizontally flipped image."""
    allow_change: bool = False
    """Go on with a run on another data set than it was trained on."""
    workers: NonNegative = 2
    """Loader processes of each rank; 0 reads in the training process."""


class Model(Section):
    """The transformer: a name from the zoo (`DiT-XL/2`), or its sizes."""

    name: str | None = None
    patch_size: Positive | None = None
    hidden_size: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    learn_sigma: bool = True
    checkpoint_every: NonNegative = 0
    """Activation checkpointing: recompute every k-th block (1: all, 0: none)."""

    @pydantic.model_validator(mode="after")
    def _name_or_sizes(self) -> Model:
        sizes = {k: getattr(self, k) for k in ("patch_size", "hidden_size", "depth", "num_heads")}
        missing = [k for k, v in sizes.items() if v is None]
        if self.name is not None and len(missing) < len(sizes):
            given = next(k for k, v in sizes.items() if v is not None)
            raise ValueError(
                f"model.name={self.name} already fixes model.{given}={sizes[given]}; "
                "choose one of the two: model.name=null for the sizes, or for the name "
                + " ".join(f"model.{k}=null" for k in sizes)
            )
        if self.name is None and missing:
            raise ValueError(
                f"model.{missing[0]} is not set; give a model.name such as DiT-B/2, or all of "
                + ", ".join(f"model.{k}" for k in sizes)
            )
        return self


class Objective(Section):
    """DDPM as published: linear schedule, eps-MSE plus the learned-variance term."""

    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    class_dropout: Probability = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""


class Optimizer(Section):
    """AdamW with an exponential moving average of the weights, and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero at train.steps along a half cosine."""
    warmup_steps: NonNegative = 0


class Train(Section):
    """Length, batch and housekeeping."""

    steps: Positive = 400_000
    global_batch_size: Positive = 256
    """Samples of one optimizer step, over all ranks and micro-steps."""
    micro_batch_size: Positive = 32
    """Most samples that one rank holds at a time; gradients accumulate over the rest."""
    expect_ranks: Positive | None = None
    """Refuse to start with another number of ranks."""
    stop_after_hours: Annotated[float, Field(gt=0)] | None = None
    """Save and end in good order after this time, for queues with a limit."""
    log_every: Positive = 100
    checkpoint_every: Positive = 10_000
    """Steps between two checkpoints. Training does not wait while they are written."""
    keep_checkpoints: Positive = 3
    """How many of the newest stay."""
    keep_every: NonNegative = 0
    """Those whose step is a multiple of this stay too; 0 for none."""
    keep_best: Literal["validation/loss", "validation_ema/loss"] | None = None
    """The one with the least of this metric stays too."""


class Preview(Section):
    """Sample grids during training, from the averaged weights and the same noise every time."""

    every: NonNegative = 0
    """Steps between two grids; 0 for none."""
    vae: str | None = None
    """Decoder: a folder or hub id. Default: the one that the manifest names."""
    classes: Positive = 8
    per_class: Positive = 4
    cfg_scale: Annotated[float, Field(ge=0)] = 4.0
    steps: Positive = 50
    sampler: Literal["ddpm", "ddim"] = "ddim"


class Validation(Section):
    """Loss on other data during training, on the same noise and timesteps every time."""

    path: str = ""
    """Folder or URL of a `manifest.json`, as `tools/shards.py split` makes it; empty for none."""
    every: Positive = 5_000
    """Steps between two evaluations."""


class Config(Section):
    """Everything that the recipe owns."""

    name: str = Field("dit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run directory is `runs/NAME` unless `--run` says otherwise."""
    seed: int = 0
    data: Data = Data()
    model: Model
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    preview: Preview = Preview()
    validation: Validation = Validation()

    @property
    def lanes(self) -> int:
        """Number of lanes that the order is cut into."""
        return self.data.lanes or math.gcd(self.train.global_batch_size, 64)

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Config:
        batch = self.train.global_batch_size
        if batch % self.lanes:
            raise ValueError(
                f"data.lanes={self.lanes} does not divide train.global_batch_size={batch}; "
                f"leave it out for {math.gcd(batch, 64)}"
            )
        every = self.train.checkpoint_every
        if self.train.keep_every % every:
            raise ValueError(
                f"train.keep_every={self.train.keep_every} is not a multiple of "
                f"train.checkpoint_every={every}; choose e.g. {every * 10}"
            )
        if self.train.keep_best and not self.validation.path:
            raise ValueError(
                f"train.keep_best={self.train.keep_best} needs validation.path; set it to a data "
                "set that `tools/shards.py split` made"
            )
        if self.train.keep_best and every % self.validation.every:
            raise ValueError(
                f"train.keep_best={self.train.keep_best} needs a validation at every checkpoint, "
                f"but validation.every={self.validation.every} does not divide "
                f"train.checkpoint_every={every}; set validation.every={every}"
            )
        if self.optimizer.schedule == "cosine" and self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves the cosine no step "
                f"of train.steps={self.train.steps}; shorten the warm-up"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved configuration, as it is written into the run directory."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# What a resumed run may change; everything else would make it another run.
_RESUMABLE = {
    "name", "data.path", "data.cache", "data.cache_gb", "data.allow_change", "data.workers",
    "model.checkpoint_every",
    "train.steps", "train.micro_batch_size", "train.expect_ranks", "train.stop_after_hours",
    "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every",
    "train.keep_best",
}  # fmt: skip

_WATCHING = ("preview.", "validation.")


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe (a name or a YAML file) with `section.key=value` overrides.

    Raises:
        ConfigError: unknown recipe or key, a value out of range, a key that DeepSpeed's JSON owns.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
        if not path.is_file():
            names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
            raise ConfigError(
                f"--config {recipe}: no such recipe{nearest(recipe, names)}; "
                f"recipes are {', '.join(names)}, or give a .yaml file"
            )
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError(f"--config {path}: cannot be read ({e.strerror})") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"--config {path}: not valid YAML ({e})") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: expected sections such as `model:` and `train:`")
    for override in overrides:
        _apply(tree, override)
    return parse(tree, source=f"{path} with the command line" if overrides else str(path))


def parse(tree: dict[str, Any], source: str) -> Config:
    """A validated `Config` from nested dictionaries; every fault is told, `source` is named."""
    unknown_keys = [key for key in _keys(tree) if key not in _KNOWN]
    if unknown_keys:
        faults = [_unknown_key(key) for key in unknown_keys[:20]]  # each takes milliseconds
        faults += [f"and {len(unknown_keys) - 20} more"] * (len(unknown_keys) > 20)
        raise ConfigError(f"{source}: " + "\n".join(faults))
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as e:
        raise section_error(source, e) from None


def section_error(source: str, error: pydantic.ValidationError) -> ConfigError:
    """The same faults as one sentence each."""
    return ConfigError(f"{source}: " + "\n".join(_sentence(fault) for fault in error.errors()))


def check_resume(old: Config, new: Config) -> None:
    """Refuse to go on with a run under settings that would make it another run."""
    before, after = dict(_leaves(old.model_dump())), dict(_leaves(new.model_dump()))
    changed = [
        f"{key}={after[key]} (was {before[key]})"
        for key in after
        if before[key] != after[key] and key not in _RESUMABLE and not key.startswith(_WATCHING)
    ]
    if changed:
        raise ConfigError(
            f"this run was made with other settings: {', '.join(changed)}; "
            "put them back, or start another run with --run runs/OTHER_NAME"
        )


# --------------------------------------------------------------------------- who owns what

DEEPSPEED_KEYS = (
    "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor",
    "comms_logger", "wall_clock_breakdown", "memory_breakdown", "steps_per_print", "dump_state",
)  # fmt: skip
RECIPE_OWNS = {
    "activation_checkpointing": "model.checkpoint_every",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "the section `optimizer`",
    "scheduler": "optimizer.schedule",
    "tensorboard": "train.log_every (TensorBoard is always written)",
    "checkpoint": "train.checkpoint_every",
}


# --------------------------------------------------------------------------- keys and sentences


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _keys(tree: dict[str, Any]) -> Iterator[str]:
    """Dotted names of all settings, sections with a non-mapping value included."""
    return (key for key, _ in _leaves(tree))


def _known(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _known(field.annotation, f"{prefix}{key}.")
        yield prefix + key


_KNOWN = set(_known(Config))


def unknown(key: str, value: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not among the known ones."""
    names = list(known)
    near = nearest(value, names)
    return ConfigError(f"{key}={value} is unknown{near}; choose from {', '.join(names)}")


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint at the known word that looks most like this one, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def _unknown_key(key: str) -> str:
    parts = key.split(".")
    for part in parts:
        if part in DEEPSPEED_KEYS:
            return f"{key} belongs to the DeepSpeed JSON: set {part} in the --deepspeed_config file"
        if part in RECIPE_OWNS and part not in ("optimizer",):
            return f"{key} is DeepSpeed's name; here it is {RECIPE_OWNS[part]}"
    tails = {name.rsplit(".", 1)[-1]: name for name in sorted(_KNOWN)}
    near = difflib.get_close_matches(key, sorted(_KNOWN), n=1, cutoff=0.75)
    near = near or [name for name in sorted(_KNOWN) if "." in name and parts[-1] in name][:1]
    near = near or [tails[t] for t in difflib.get_close_matches(parts[-1], tails, n=1, cutoff=0.6)]
    return f"unknown key {key}" + (f" (did you mean {near[0]}?)" if near else "")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from e
    if key not in _KNOWN:
        raise ConfigError(_unknown_key(key))
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section in the recipe")
    tree[last] = value


def _sentence(fault: Any) -> str:
    key, message = ".".join(str(part) for part in fault["loc"]), fault["msg"]
    if fault["type"] == "value_error":
        return message.removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{key} is not set"
    value = fault["input"]
    return f"{key}={value if not isinstance(value, dict) else '{…}'}: {message.lower()}"
