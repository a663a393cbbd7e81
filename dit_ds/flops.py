"""Parameters and multiply-adds of a DiT, from its sizes alone.

    python -m dit_ds.flops [--model DiT-XL/2] [--input-size 32]

prints what each option costs. A multiply-add is two FLOPs; the literature's "Gflops" of a DiT are
billions of multiply-adds. Counted are matrix products, in which nearly all of them lie: norms,
activations and rotations count as nothing. A training step costs three forward passes, four with
activation checkpointing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from dit_ds.layers import swiglu_size
from dit_ds.models import DIT_MODELS


@dataclass(frozen=True)
class Cost:
    """What a model costs, its arguments being those of `DiT`.

    parameters: trained ones; position_embedding: elements of the fixed one, which published counts
    include. multiply_adds: of the forward pass of one image.
    """

    parameters: int
    position_embedding: int
    multiply_adds: int


def cost(
    *,
    input_size: int | Sequence[int],
    patch_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    num_classes: int,
    mlp_ratio: float = 4.0,
    learn_sigma: bool = True,
    qk_norm: bool = False,
    mlp: str = "gelu",
    rope: bool = False,
    norm: str = "layer",
    fp32_norms: bool = False,
) -> Cost:
    """Parameters and multiply-adds; the last three options change neither."""
    D = hidden_size
    high, wide = (input_size, input_size) if isinstance(input_size, int) else input_size
    tokens = (high // patch_size) * (wide // patch_size)
    patch = patch_size**2 * in_channels
    out = patch * (2 if learn_sigma else 1)
    if mlp == "swiglu":
        hidden = swiglu_size(D, mlp_ratio)
        into = 2 * hidden
    else:
        into = hidden = int(D * mlp_ratio)
    # (inputs, outputs) of linear layers: those that each token passes, and those of the condition.
    of_token = [(D, 3 * D), (D, D), (D, into), (hidden, D)]
    of_condition = [(D, 6 * D)]
    once_token = [(patch, D), (D, out)]
    once_condition = [(256, D), (D, D), (D, 2 * D)]
    attention = 2 * tokens**2 * D  # queries with keys, weights with values
    gains = 2 * (D // num_heads) * qk_norm
    return Cost(
        parameters=depth * (_weights(of_token + of_condition) + gains)
        + _weights(once_token + once_condition)
        + (num_classes + 1) * D,
        position_embedding=tokens * D,
        multiply_adds=depth * (tokens * _products(of_token) + _products(of_condition) + attention)
        + tokens * _products(once_token)
        + _products(once_condition),
    )


def _products(layers: list[tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in layers)


def _weights(layers: list[tuple[int, int]]) -> int:
    return sum((inputs + 1) * outputs for inputs, outputs in layers)


OPTIONS: dict[str, dict[str, bool | str]] = {
    "as published": {},
    "qk_norm=true": {"qk_norm": True},
    "rope=true": {"rope": True},
    "mlp=swiglu": {"mlp": "swiglu"},
    "norm=rms": {"norm": "rms"},
    "fp32_norms=true": {"fp32_norms": True},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of the options."""
    parser = argparse.ArgumentParser(description="What a DiT and each of its options cost.")
    parser.add_argument("--model", default="DiT-XL/2", choices=DIT_MODELS)
    parser.add_argument(
        "--input-size", type=int, default=[32], nargs="+", metavar="SIDE", help="height and width"
    )
    args = parser.parse_args(arguments)
    if len(args.input_size) > 2:
        parser.error("--input-size takes one side, or height and width")
    size = args.input_size if len(args.input_size) == 2 else args.input_size[0]
    sizes = DIT_MODELS[args.model] | {"in_channels": 4, "num_classes": 1000}
    first = cost(input_size=size, **sizes)  # type: ignore[arg-type]
    print(f"{args.model}, latents of 4 channels and {size}: one image, forward")
    print("option          | parameters  | more     | multiply-adds (G) | more (G)")
    for option, values in OPTIONS.items():
        this = cost(input_size=size, **sizes, **values)  # type: ignore[arg-type]
        total, more = this.parameters + this.position_embedding, this.parameters - first.parameters
        work = this.multiply_adds / 1e9
        print(
            f"{option:15} | {total:11,} | {more:+8,} | {work:17.2f} | "
            f"{work - first.multiply_adds / 1e9:+8.2f}"
        )


if __name__ == "__main__":
    main()
