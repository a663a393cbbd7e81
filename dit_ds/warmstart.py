"""Warm starts: the first weights of a run out of other weights, for fine-tuning.

`init.from` names an export, a run, a file in the published layout or a diffusers folder. What the
data and the objective decide may be another: the classes (rows of the label table go by name), the
image size (the position embedding is a function of it), a learned variance. Anything else must fit.
Optimizer state is never taken: averages start from these weights, moments from zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_ds import distributed, exchange, export, layouts, published, zero
from dit_ds.export import Description, Sizes
from dit_ds.layouts import State, Unsaid
from dit_ds.models import DiT, initial_value, sincos_pos_embed
from dit_ds.settings import Objective

_TABLE = "y_embedder.embedding_table.weight"
_FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")
_OF_OPTIONS = re.compile(r"blocks\.\d+\.attn\.[qk]_norm\.weight")
"""Parameters that only an option adds: a source without it has none to give."""


@dataclasses.dataclass(frozen=True)
class Start:
    """First values of parameters, float32 and whole; those not in it keep their `initial_value`."""

    values: State
    told: str


def read(source: str, weights: dict[str, Any], *, seed: int) -> Start:
    """What the weights of a run start from; a collective, on every rank alike.

    Args:
        source: a path, as `init.from` has it.
        weights: what the run says of its weights (`rundir.describe`).
        seed: of the values that the source does not give.

    Raises:
        RankError: the source cannot be read, or is of another model; tells every tensor that does
            not fit.
    """
    path = Path(source)
    with distributed.agreed():
        if "://" in source:
            raise ValueError(f"init.from={source}: a URL; fetch the file, and give its path")
    try:
        state, about = _source(path)
        distributed.agree_on("what it holds", _digest(state, about))
        with distributed.agreed():
            target = export.describe(weights | {"step": 0, "images_seen": 0}, "the run")
            return fit(state, about, target, seed=seed, source=source)
    except distributed.RankError as e:
        named = str(e).startswith(source)
        raise distributed.RankError(f"init.from={'' if named else source + ': '}{e}") from e


def load(engine: Any, start: Start) -> None:
    """Put the values into the master weights of a new engine, at any ZeRO stage; a collective."""
    with zero.writing_masters(engine):
        for flat in zero.flats(engine):
            masters = flat.tensor.detach().view(-1)
            for f in flat.fragments:
                if f.name in start.values:
                    values = start.values[f.name].reshape(-1)[f.offset : f.offset + f.length]
                    masters[f.start : f.start + f.length] = values.to(masters.device)
    distributed.print_main(start.told)


def fit(
    state: State, about: Description | None, target: Description, *, seed: int, source: str
) -> Start:
    """Values for the model of `target` out of the tensors of another; neither is changed.

    about: of these tensors, None where nothing but the tensors is known.

    Raises:
        ValueError: another model; tells every tensor that is missing, unexpected or misshapen.
    """
    with torch.device("meta"):
        model = DiT(**target.model.model_dump())
    expected = {name: list(p.shape) for name, p in model.named_parameters()}
    found = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    values, rows = dict(found), list[str]()
    if _same_width(found.get(_TABLE), expected[_TABLE]):
        values[_TABLE], told = _label_table(found[_TABLE], about, target, seed=seed)
        rows += told
    for name in _FINAL:
        if name in found and list(found[name].shape) != expected[name]:
            values[name], told = _final_layer(name, found[name], expected[name], target)
            rows += told
    fresh = sorted(n for n in expected.keys() - values.keys() if _OF_OPTIONS.fullmatch(n))
    rows += [f"fresh    {name}" for name in _grouped(fresh)]
    needed = {name: shape for name, shape in expected.items() if name not in fresh}
    if misfit := export.misfit(needed, {name: list(t.shape) for name, t in values.items()}):
        raise ValueError(f"these weights are of another model than the run's\n{misfit}")
    _check_heads(about, target)
    export.check_finite(found, "its weights")
    rows.append(_position_embedding(state, about, target))
    resized = [name for name in values if values[name] is not found[name]]
    taken = len(values) - len(resized)
    rows.insert(0, f"taken    {taken} tensors as they are")
    where = f"{source}: "
    if about is not None and about.dataset:
        where += f"weights of step {about.step}, "
    summary = (
        f"starting from {where}{taken} tensors taken, {len(resized)} resized, {len(fresh)} fresh, "
        "no optimizer state"
    )
    differing = [f"note     {note}" for note in _differences(about, target)]
    return Start(values, "\n  ".join([summary, *rows, *differing]))


def _source(path: Path) -> tuple[State, Description | None]:
    """Tensors and what is known of them; a collective."""
    if path.suffix not in published.SUFFIXES:
        weights = exchange.read(path, Unsaid())
        return weights.state, weights.about
    with distributed.agreed():
        return published.read(path)


def _digest(state: State, about: Description | None) -> str:
    """Of all that decides the first values; ranks may have different files under one name.

    The position embedding decides none, and machines may compute its last bits otherwise.
    """
    digest = hashlib.sha256(json.dumps(about.class_names if about else None).encode())
    for name in sorted(state.keys() - {"pos_embed"}):
        digest.update(f"{name} {list(state[name].shape)}".encode())
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()


def _same_width(table: Tensor | None, expected: list[int]) -> bool:
    return (
        table is not None and table.ndim == 2 and table.shape[1] == expected[1] and len(table) > 1
    )


def _label_table(
    table: Tensor, about: Description | None, target: Description, *, seed: int
) -> tuple[Tensor, list[str]]:
    """Rows by the names of classes, or by number where one side has none and as many classes.

    The null row is kept. A run of one class is without classes: its row means what the null row
    does, unless the source has that class.
    """
    there, here = _names(about), target.class_names
    row_of = {name: row for row, name in enumerate(there or [])}
    taken = {i: row_of[name] for i, name in enumerate(here) if name in row_of}
    unnamed = there is None or _are_numbers(there) or _are_numbers(here)
    by_number = not taken and unnamed and len(table) - 1 == len(here)
    if by_number:
        taken = {i: i for i in range(len(here))}
    null = len(table) - 1
    if len(here) == 1 and not taken:
        taken = {0: null}
    taken[len(here)] = null
    if taken == {i: i for i in range(len(table))}:
        return table, ["note     classes go by number, as names are not known"] * by_number
    made = initial_value(_TABLE, (len(here) + 1, table.shape[1]), seed)
    made[list(taken)] = table[list(taken.values())]
    classes = len(taken) - 1
    told = (
        f"resized  {_TABLE} {_shape(table)} -> {_shape(made)}: null row kept, {classes} rows of "
        f"classes taken, {len(here) - classes} fresh"
    )
    if taken.get(0) == null:
        told += " (the one class starts as no class)"
    left = null - sum(row != null for row in taken.values())
    return made, [told] + [f"left     {left} rows of other classes"] * (left > 0)


def _names(about: Description | None) -> list[str] | None:
    """Names of the classes; None where they are numbers that an import of tensors alone made up."""
    if about is None:
        return None
    made_up = not about.dataset and _are_numbers(about.class_names)
    return None if made_up else about.class_names


def _are_numbers(names: list[str]) -> bool:
    return names == [str(i) for i in range(len(names))]


def _final_layer(
    name: str, tensor: Tensor, shape: list[int], target: Description
) -> tuple[Tensor, list[str]]:
    """Outputs of a model that learns its variance for one that does not, or the other way round.

    Outputs are those of a pixel of the patch after another: its noise, then its variance.
    """
    pixels, channels = target.model.patch_size**2, target.model.in_channels
    usual = (pixels * channels, 2 * pixels * channels)
    if tensor.shape[1:] != torch.Size(shape[1:]) or len(tensor) not in usual:
        return tensor, []
    made = torch.zeros(shape)
    parts = made.view(pixels, shape[0] // pixels, -1)
    parts[:, :channels] = tensor.reshape(pixels, len(tensor) // pixels, -1)[:, :channels]
    what = "variance left" if len(tensor) > len(made) else "variance fresh"
    return made, [f"resized  {name} {_shape(tensor)} -> {_shape(made)}: {what}"]


def _check_heads(about: Description | None, target: Description) -> None:
    """Shapes do not tell the number of heads, and another one would be another function."""
    sizes = target.model
    known = about.model.num_heads if about else layouts.num_heads_of(sizes.hidden_size, sizes.depth)
    if known is not None and known != sizes.num_heads:
        raise ValueError(
            f"its model has {known} heads and model.num_heads={sizes.num_heads}; set "
            f"model.num_heads={known}"
        )


def _position_embedding(state: State, about: Description | None, target: Description) -> str:
    """What is said of it; ValueError if it does not follow from its size alone, as the run's."""
    sizes = target.model
    high, wide = (side // sizes.patch_size for side in sizes.latent_size)
    found = state.get("pos_embed")
    if found is None:
        return f"fresh    pos_embed: sines and cosines of {high}x{wide} patches"
    side = round(found.shape[1] ** 0.5) if found.ndim == 3 else 0
    grid = (side, side)
    if about is not None:
        there = about.model
        grid = (there.latent_size[0] // there.patch_size, there.latent_size[1] // there.patch_size)
    # Nothing is computed for a shape that is wrong, and may be as large as a file can claim.
    fits = list(found.shape) == [1, grid[0] * grid[1], sizes.hidden_size]
    usual = torch.from_numpy(sincos_pos_embed(sizes.hidden_size, grid if fits else 1)).unsqueeze(0)
    # 1e-3: others compute it in float32, or keep it in half precision.
    if not fits or (found - usual).abs().max() > 1e-3:
        raise ValueError(
            f"its pos_embed {_shape(found)} is not the sine-cosine embedding of "
            f"{grid[0]}x{grid[1]} patches, so this DiT cannot compute what it was trained for"
        )
    if grid == (high, wide):
        return f"left     pos_embed: that of {high}x{wide} patches, as here"
    return f"resized  pos_embed: recomputed for {high}x{wide} patches (was {grid[0]}x{grid[1]})"


def _differences(about: Description | None, target: Description) -> list[str]:
    """What else is another there, and trains on from these weights all the same."""
    objective = about.objective if about else Objective()  # as published
    pairs: list[tuple[str, Any, Any, str]] = [
        (f"objective.{k}", objective, target.objective, k)
        for k in ("name", "prediction", "schedule", "num_timesteps")
    ]
    options = about.model if about else Sizes.model_construct()  # its defaults are the published
    pairs += [(f"model.{k}", options, target.model, k) for k in ("rope", "norm", "fp32_norms")]
    if about is not None:
        pairs += [(k, about, target, k) for k in ("scaling_factor", "shift_factor")]
    notes = [
        f"{name}={getattr(new, key)} here, {getattr(old, key)} there"
        for name, old, new, key in pairs
        if getattr(new, key) != getattr(old, key)
    ]
    if about is not None and about.vae_sha256 and about.vae_sha256 != target.vae_sha256:
        notes.append(f"latents of another VAE: {target.vae} here, {about.vae} there")
    return notes


def _grouped(names: list[str]) -> list[str]:
    """`blocks.*.attn.q_norm.weight (28)` for those of all blocks."""
    counts: dict[str, int] = {}
    for name in names:
        key = re.sub(r"\.\d+\.", ".*.", name)
        counts[key] = counts.get(key, 0) + 1
    return [f"{name} ({count})" for name, count in counts.items()]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
