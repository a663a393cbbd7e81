"""The published DiT's tensors, and diffusers': names, shapes, and what they cannot express.

Our own layout is the published one. diffusers keeps queries, keys and values apart, a copy of the
timestep MLP and the label table in every block, and its pipeline takes row 1000 for the null class.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_ds import export
from dit_ds.export import Description, Sizes
from dit_ds.models import DIT_MODELS
from dit_ds.settings import Objective

VAE, SCALING_FACTOR = "stabilityai/sd-vae-ft-ema", 0.18215
"""Of the published models."""
NULL_ROW = 1000
"""Of the label table, in `diffusers.DiTPipeline`."""

State = dict[str, Tensor]

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
_POS_EMBED_THERE = "pos_embed.pos_embed"


@dataclasses.dataclass(frozen=True)
class Unsaid:
    """What tensors alone do not say; as of the published ImageNet models where it is None.

    vae: `VAE` unless set. scaling_factor: `SCALING_FACTOR` unless set. image_size: pixels of each
    side, 8 for each of the latents unless set. num_heads: of models that are not in the zoo.
    class_names: their numbers unless set.
    """

    vae: str | None = None
    scaling_factor: float | None = None
    image_size: int | None = None
    num_heads: int | None = None
    class_names: Sequence[str] | None = None

    def check_taken(self, about: Description, source: object) -> None:
        """Raise ValueError that names what is set and is not what the source says of itself."""
        said = {
            "vae": about.vae,
            "scaling_factor": about.scaling_factor,
            "image_size": about.image_size,
            "num_heads": about.model.num_heads,
            "class_names": about.class_names,
        }
        for key, value in said.items():
            given = getattr(self, key)
            if given is not None and given != value:
                option = "--" + key.replace("_", "-")
                raise ValueError(
                    f"{option} {given!s:.200} is for weights that do not tell, and {source} says "
                    f"{value!s:.200}; leave {option} out"
                )


def unexpressed(about: Description, *, diffusers: bool = False) -> list[str]:
    """Settings of these weights that the published layout cannot express, nor diffusers' model."""
    sizes, objective = about.model, about.objective
    high, wide = sizes.latent_size
    found = [f"model.{k}=true" for k in ("qk_norm", "rope", "fp32_norms") if getattr(sizes, k)]
    found += [f"model.mlp={sizes.mlp}"] * (sizes.mlp != "gelu")
    found += [f"model.norm={sizes.norm}"] * (sizes.norm != "layer")
    found += [f"latents of {high}x{wide}, which are not square"] * (high != wide)
    found += [f"a shift of latents, {about.shift_factor}"] * (about.shift_factor != 0.0)
    if objective.name != "ddpm":
        found.append(f"objective.name={objective.name}")
    elif not diffusers:  # whose schedulers know these
        found += [f"objective.prediction={objective.prediction}"] * (objective.prediction != "eps")
        found += [f"objective.schedule={objective.schedule}"] * (objective.schedule != "linear")
        steps = objective.num_timesteps
        found += [f"objective.num_timesteps={steps}"] * (steps != Objective().num_timesteps)
    if diffusers:
        found += [f"model.mlp_ratio={sizes.mlp_ratio}"] * (sizes.mlp_ratio != 4.0)
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
    telling = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        _TABLE: 2,
        "final_layer.linear.bias": 1,
        "blocks.0.mlp.fc1.bias": 1,
    }
    wrong = [n for n, ndim in telling.items() if n not in state or state[n].ndim != ndim]
    wrong += [n for n in telling if n in state and not state[n].numel()]
    if wrong:
        raise ValueError(
            f"{source}: not the tensors of a published DiT ({', '.join(wrong)} missing or of "
            f"another shape); it holds {', '.join(sorted(state)[:5])!s:.300}, ..."
        )
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    num_classes = len(state[_TABLE]) - 1
    values, mlp_size = len(state["final_layer.linear.bias"]), len(state["blocks.0.mlp.fc1.bias"])
    depth = _depth(state)
    side = round(state["pos_embed"].shape[1] ** 0.5) * patch_size
    out_channels = values / patch_size**2
    if out_channels not in (in_channels, 2 * in_channels) or num_classes < 1:
        raise ValueError(
            f"{source}: {values} outputs of {in_channels} channels, {num_classes} classes; not "
            "those of a DiT"
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
        scaling_factor=unsaid.scaling_factor or SCALING_FACTOR,
        shift_factor=0.0,
        image_size=unsaid.image_size or 8 * side,
        class_names=names,
        objective=Objective(),
        vae=unsaid.vae or VAE,
        vae_sha256="",
        dataset="",
        step=0,
        images_seen=0,
    )


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
    found[_POS_EMBED_THERE] = state["pos_embed"]
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


def embeddings_there(state: State) -> tuple[int, int]:
    """Channels and rows of the label table in diffusers' layout, 0 where there is no such table."""
    table = state.get(f"transformer_blocks.0.norm1.emb.{_TABLE_THERE}")
    if table is None or table.ndim != 2:
        return 0, 0
    return table.shape[1], table.shape[0]


def from_diffusers(
    state: State, num_classes: int, source: str, *, null_row: int = NULL_ROW
) -> State:
    """Tensors in the published layout; where diffusers' hold no `pos_embed` neither do these.

    Raises:
        ValueError: tensors are missing or too many, all of which are told, or the blocks' copies of
            one differ.
    """
    depth = max(_depth(state), 1)
    expected: dict[str, list[int] | None] = dict.fromkeys(_names_there(depth))
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    table = export.misfit(expected, {k: v for k, v in shapes.items() if k != _POS_EMBED_THERE})
    if table:
        raise ValueError(f"{source}: not the tensors of a DiT of diffusers\n{table}")
    found = {here: state[there] for here, there in _pairs(_ENDS, "", "")}
    if _POS_EMBED_THERE in state:
        found["pos_embed"] = state[_POS_EMBED_THERE]
    for i in range(depth):
        here, there = f"blocks.{i}.", f"transformer_blocks.{i}."
        found |= {a: state[b] for a, b in _pairs(_BLOCK, here, there)}
        for a, b in [*_pairs(_EMBEDDERS, "", ""), (_TABLE, _TABLE_THERE)]:
            copy = state[f"{there}norm1.emb.{b}"]
            if not torch.equal(found.setdefault(a, copy), copy):
                raise ValueError(f"{source}: block {i} has another {b} than block 0")
        for kind in ("weight", "bias"):
            parts = [state[f"{there}attn1.to_{n}.{kind}"] for n in ("q", "k", "v")]
            if len({part.shape for part in parts}) > 1 or parts[0].ndim == 0:
                raise ValueError(f"{source}: queries, keys and values of block {i} differ in shape")
            found[f"{here}attn.qkv.{kind}"] = torch.cat(parts)
    labels = len(found[_TABLE]) if found[_TABLE].ndim == 2 else 0
    if max(null_row, num_classes - (num_classes <= null_row)) >= labels:
        raise ValueError(f"{source}: {labels} labels are too few for {num_classes} classes")
    rows = [label + (label >= null_row) for label in range(num_classes)] + [null_row]
    found[_TABLE] = found[_TABLE][rows]
    return found


def _names_there(depth: int) -> list[str]:
    """Of the tensors of diffusers' transformer, but for the position embedding."""
    names = [b for _, b in _pairs(_ENDS, "", "")]
    for i in range(depth):
        there = f"transformer_blocks.{i}."
        names += [b for _, b in _pairs(_BLOCK, "", there)]
        names += [b for _, b in _pairs(_EMBEDDERS, "", f"{there}norm1.emb.")]
        names.append(f"{there}norm1.emb.{_TABLE_THERE}")
        names += [f"{there}attn1.to_{n}.{kind}" for n in "qkv" for kind in ("weight", "bias")]
    return names


def _pairs(names: dict[str, str], here: str, there: str) -> list[tuple[str, str]]:
    return [
        (f"{here}{a}.{kind}", f"{there}{b}.{kind}")
        for a, b in names.items()
        for kind in ("weight", "bias")
    ]


def _is_block(name: str) -> bool:
    return re.match(r"(transformer_)?blocks\.\d", name) is not None


def _depth(state: State) -> int:
    """Number of blocks; names that skip some are told as missing and unexpected afterwards."""
    return len({name.split(".")[1] for name in state if _is_block(name)})
