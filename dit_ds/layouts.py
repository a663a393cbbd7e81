"""The published DiT's tensors, and diffusers': names, shapes, and what they cannot express.

Our own layout is the published one. diffusers keeps queries, keys and values apart, a copy of the
timestep MLP and the label table in every block, and its pipeline takes row 1000 for the null class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_ds import export, files
from dit_ds.export import Description, Sizes, Weights
from dit_ds.models import DIT_MODELS, DiT
from dit_ds.settings import Objective

NULL_ROW = 1000
"""Of the label table, in `diffusers.DiTPipeline`."""

State = dict[str, Tensor]

_MOST_ROWS = 40  # of a table of tensors

_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_TABLE, _TABLE_THERE = "y_embedder.embedding_table.weight", "class_embedder.embedding_table.weight"


@dataclasses.dataclass(frozen=True)
class Unsaid:
    """What tensors alone do not say; as of the published ImageNet models unless set.

    image_size: pixels of each side, 8 for each of the latents unless set. num_heads: of models that
    are not in the zoo. class_names: their numbers unless set.
    """

    vae: str = "stabilityai/sd-vae-ft-ema"
    scaling_factor: float = 0.18215
    image_size: int | None = None
    num_heads: int | None = None
    class_names: Sequence[str] | None = None


def unexpressed(about: Description, *, diffusers: bool = False) -> list[str]:
    """Settings of these weights that the published layout cannot express, nor diffusers' model."""
    sizes, objective = about.model, about.objective
    high, wide = sizes.latent_size
    found = [f"model.{k}=true" for k in ("qk_norm", "rope", "fp32_norms") if getattr(sizes, k)]
    found += [f"model.mlp={sizes.mlp}"] * (sizes.mlp != "gelu")
    found += [f"model.norm={sizes.norm}"] * (sizes.norm != "layer")
    found += [f"latents of {high}x{wide}, which are not square"] * (high != wide)
    if objective.name != "ddpm":
        found.append(f"objective.name={objective.name}")
    elif not diffusers:  # whose schedulers know these
        found += [f"objective.prediction={objective.prediction}"] * (objective.prediction != "eps")
        found += [f"objective.schedule={objective.schedule}"] * (objective.schedule != "linear")
    if diffusers:
        found += [f"model.mlp_ratio={sizes.mlp_ratio}"] * (sizes.mlp_ratio != 4.0)
        found += [f"a shift of latents, {about.shift_factor}"] * (about.shift_factor != 0.0)
    return found


def check_expressed(about: Description, out: object, *, diffusers: bool = False) -> None:
    """Raise ValueError that names what `unexpressed` finds."""
    found = unexpressed(about, diffusers=diffusers)
    if found:
        layout = "a diffusers DiTPipeline" if diffusers else "the published layout"
        raise ValueError(
            f"--out {out}: {layout} cannot express {', '.join(found)}; export these weights as "
            ".safetensors"
        )


def describe(
    state: State, unsaid: Unsaid, source: str, *, num_heads: int | None = None
) -> Description:
    """A description of published tensors, as far as shapes tell it, and `unsaid` for the rest.

    Raises:
        ValueError: tensors that tell the sizes are missing or of other shapes, or the number of
            heads is not known.
    """
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        num_tokens = state["pos_embed"].shape[1]
        num_classes = len(state[_TABLE]) - 1
        values = len(state["final_layer.linear.bias"])
        mlp_size = len(state["blocks.0.mlp.fc1.bias"])
    except (KeyError, ValueError, IndexError, TypeError) as e:
        raise ValueError(
            f"{source}: not the tensors of a published DiT ({e!s:.100} missing or of another "
            f"shape); it holds {', '.join(sorted(state)[:5])!s:.300}, ..."
        ) from e
    depth = 1 + max(int(k.split(".")[1]) for k in state if _is_block(k))
    side = round(num_tokens**0.5) * patch_size
    out_channels = values / patch_size**2
    if out_channels not in (in_channels, 2 * in_channels) or num_classes < 1:
        raise ValueError(
            f"{source}: {values} outputs of {in_channels} channels, not those of a DiT"
        )
    num_heads = num_heads or unsaid.num_heads or num_heads_of(hidden_size, depth)
    if num_heads is None:
        raise ValueError(
            f"{source}: {depth} blocks of {hidden_size} channels are no size of the zoo, and "
            "tensors do not tell the number of heads; give --num-heads"
        )
    names = [str(i) for i in range(num_classes)]
    if unsaid.class_names is not None:
        if len(unsaid.class_names) != num_classes:
            raise ValueError(
                f"{source}: {len(unsaid.class_names)} class names given, the model has "
                f"{num_classes} classes"
            )
        names = list(unsaid.class_names)
    sizes = Sizes(
        input_size=side,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        mlp_ratio=mlp_size / hidden_size,
        learn_sigma=out_channels == 2 * in_channels,
    )
    return Description(
        model=sizes,
        latent_shape=(in_channels, side, side),
        scaling_factor=unsaid.scaling_factor,
        shift_factor=0.0,
        image_size=unsaid.image_size or 8 * side,
        class_names=names,
        objective=Objective(),
        vae=unsaid.vae,
        vae_sha256="",
        dataset="",
        step=0,
        images_seen=0,
    )


def misfit(expected: export.Shapes, found: export.Shapes) -> str:
    """A table of the tensors that are missing, unexpected or misshapen; empty if all fit."""
    rows = [f"missing     {n:<50} {s}" for n, s in expected.items() if n not in found]
    rows += [f"unexpected  {n!s:<50.200} {s}" for n, s in found.items() if n not in expected]
    rows += [
        f"misshapen   {n:<50} {s}, expected {expected[n]}"
        for n, s in found.items()
        if n in expected and s != expected[n]
    ]
    if len(rows) > _MOST_ROWS:
        rows[_MOST_ROWS:] = [f"and {len(rows) - _MOST_ROWS} more"]
    return "\n".join("  " + files.printable(row) for row in rows)


def check(weights: Weights, source: str) -> None:
    """Raise ValueError that names `source` and all tensors that are not those of the model."""
    try:
        weights.check(source)
    except ValueError as e:
        found = {name: list(tensor.shape) for name, tensor in weights.state.items()}
        sizes = weights.about.model
        # A description may claim anything: one that takes time and memory to build is told alone.
        tokens = math.prod(side // sizes.patch_size for side in sizes.latent_size)
        if sizes.depth > len(found) or found.get("pos_embed") != [1, tokens, sizes.hidden_size]:
            raise
        try:
            with torch.device("meta"):
                model = DiT(**sizes.model_dump())
        except (ValueError, RuntimeError, ArithmeticError):
            raise e from None
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        raise ValueError(f"{e}\n{misfit(expected, found)}") from e


def num_heads_of(hidden_size: int, depth: int) -> int | None:
    """Of the size of the zoo with such blocks."""
    for sizes in DIT_MODELS.values():
        if (sizes["hidden_size"], sizes["depth"]) == (hidden_size, depth):
            return sizes["num_heads"]
    return None


def row_of(label: int) -> int:
    """Of a class in diffusers' label table: the null row stands between 999 and 1000."""
    return label + (label >= NULL_ROW)


def to_diffusers(state: State) -> State:
    """Tensors in diffusers' layout, each with memory of its own.

    Rows of the label table that no class has are the null row.
    """
    found = {there: state[here] for here, there in _pairs(_ENDS, "", "")}
    found["pos_embed.pos_embed"] = state["pos_embed"]
    table = state[_TABLE]
    null = len(table) - 1
    rows = [*range(min(null, NULL_ROW)), *[null] * (NULL_ROW - null), null]
    table = table[rows + list(range(NULL_ROW, null))]
    for i in range(_depth(state)):
        here, there = f"blocks.{i}.", f"transformer_blocks.{i}."
        found |= {b: state[a] for a, b in _pairs(_BLOCK, here, there)}
        found |= {b: state[a] for a, b in _pairs(_EMBEDDERS, "", f"{there}norm1.emb.")}
        found[f"{there}norm1.emb.{_TABLE_THERE}"] = table
        for kind in ("weight", "bias"):
            parts = state[f"{here}attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("q", "k", "v"), parts, strict=True):
                found[f"{there}attn1.to_{name}.{kind}"] = part
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()
    }


def from_diffusers(
    state: State, num_classes: int, source: str, *, null_row: int = NULL_ROW
) -> State:
    """Tensors in the published layout; where diffusers' hold no `pos_embed` neither do these.

    Raises:
        ValueError: tensors are missing or too many, or the blocks' copies of one differ.
    """
    left = dict(state)
    try:
        found = {here: left.pop(there) for here, there in _pairs(_ENDS, "", "")}
        if "pos_embed.pos_embed" in left:
            found["pos_embed"] = left.pop("pos_embed.pos_embed")
        shared = [*_pairs(_EMBEDDERS, "", ""), (_TABLE, _TABLE_THERE)]
        for i in range(1 + max((int(k.split(".")[1]) for k in state if _is_block(k)), default=0)):
            here, there = f"blocks.{i}.", f"transformer_blocks.{i}."
            found |= {a: left.pop(b) for a, b in _pairs(_BLOCK, here, there)}
            for a, b in shared:
                copy = left.pop(f"{there}norm1.emb.{b}")
                if not torch.equal(found.setdefault(a, copy), copy):
                    raise ValueError(f"{source}: block {i} has another {b} than block 0")
            for kind in ("weight", "bias"):
                parts = [left.pop(f"{there}attn1.to_{n}.{kind}") for n in ("q", "k", "v")]
                found[f"{here}attn.qkv.{kind}"] = torch.cat(parts)
    except KeyError as e:
        raise ValueError(f"{source}: {e!s:.200} is missing, so it is no DiT of diffusers") from e
    if left:
        raise ValueError(f"{source}: unknown tensors, the first is {min(left)!r:.200}")
    rows = [label + (label >= null_row) for label in range(num_classes)] + [null_row]
    if max(rows) >= len(found[_TABLE]):
        raise ValueError(
            f"{source}: {len(found[_TABLE])} labels are too few for {num_classes} classes"
        )
    found[_TABLE] = found[_TABLE][rows]
    return found


def _pairs(names: dict[str, str], here: str, there: str) -> list[tuple[str, str]]:
    return [
        (f"{here}{a}.{kind}", f"{there}{b}.{kind}")
        for a, b in names.items()
        for kind in ("weight", "bias")
    ]


def _is_block(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in ("blocks", "transformer_blocks") and parts[1].isdecimal()


def _depth(state: State) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if _is_block(name))
