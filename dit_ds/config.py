"""A run's configuration from a recipe: loading, overrides, and a sentence for each mistake.

A recipe is YAML, from `dit_ds/recipes` by name or any file by path; `section.key=value` on the
command line overrides it. What the DeepSpeed JSON owns (ZeRO, offload, communication, precision) is
refused here, and the other way round, with a sentence that names the owner. No torch here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel

from dit_ds.settings import Config

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and the remedy."""


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
    """The same faults as one sentence each; of a value with several forms, what each would be."""
    told: dict[str, list[str]] = {}
    for fault in error.errors():
        told.setdefault(_key(fault["loc"]), []).append(_sentence(fault))
    lines = [
        first + "".join(f"; or {s.rpartition(': ')[2]}" for s in more)
        for first, *more in told.values()
    ]
    return ConfigError(f"{source}: " + "\n".join(lines))


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
        yield prefix + (field.alias or key)


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


def _key(location: Sequence[int | str]) -> str:
    """The setting's name: pydantic also names the form that it tried last."""
    parts = [str(part) for part in location]
    while len(parts) > 1 and ".".join(parts) not in _KNOWN and not parts[-1].isdecimal():
        parts.pop()
    return ".".join(parts)


def _sentence(fault: Any) -> str:
    key, message = _key(fault["loc"]), fault["msg"]
    if fault["type"] == "value_error":
        return message.removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{key} is not set"
    value = fault["input"]
    return f"{key}={value if not isinstance(value, dict) else '{…}'}: {message.lower()}"
