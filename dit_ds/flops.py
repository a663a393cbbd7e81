"""Parameters, multiply-adds and activation bytes of a DiT, from its sizes alone.

    python -m dit_ds.flops [--model DiT-XL/2] [--input-size 32]

prints what each option costs. A multiply-add is two FLOPs; the literature's "Gflops" of a DiT are
billions of multiply-adds. Counted are matrix products, in which nearly all of them lie: norms,
activations and rotations count as nothing. A training step costs three forward passes, four with
activation checkpointing.

Activation bytes are those of the tensors that autograd keeps from the forward pass to the backward
pass, as torch's CUDA kernels keep them. Attention, be it flash, memory-efficient or cuDNN, keeps
queries, keys, values, its output, and in float32 the softmax's denominator of each token and head,
but never the T x T weights. Norms keep their input, and float32 statistics of each token. On a CPU
torch makes RMS norms of elementary operations, which keep up to 8 bytes more for each channel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dit_ds.layers import swiglu_size
from dit_ds.models import DIT_MODELS


@dataclass(frozen=True)
class Cost:
    """What a model costs, its arguments being those of `DiT`.

    parameters: trained ones; position_embedding: elements of the fixed one, which published counts
    include. multiply_adds: of the forward pass of one image. block_bytes: what a block keeps of one
    image for the backward pass, unless it is recomputed. activation_bytes: what the model keeps of
    it, without the loss; while a block is recomputed, its block_bytes come on top.
    """

    parameters: int
    position_embedding: int
    multiply_adds: int
    block_bytes: int
    activation_bytes: int


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
    checkpoint_every: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Parameters, multiply-adds, and activation bytes with weights in `dtype`."""
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
    size = dtype.itemsize
    one_norm = _norm_bytes(tokens, D, norm=norm, size=size, inner_size=4 if fp32_norms else size)
    one_attention = tokens * (5 * D * size + 4 * num_heads)  # queries, keys, values, output; proj's
    if qk_norm or rope:  # other queries and keys, and the output in their layout and in proj's
        one_attention += tokens * 3 * D * size
    if qk_norm:
        one_attention += 2 * 4 * tokens * num_heads  # statistics
        if fp32_norms and size < 4:
            one_attention += 4 * (2 * tokens * D + gains)  # what it was made from, in float32
    gated = 2 * hidden if mlp == "swiglu" else hidden
    one_mlp = tokens * (into + gated + D) * size
    one_block = 2 * one_norm + one_attention + one_mlp + (D + 6 * D) * size  # and the modulation
    recomputed = len(range(0, depth, checkpoint_every)) if checkpoint_every else 0
    # Latents, frequencies and the timestep MLP's hidden layer; the condition; a label.
    once = (patch * tokens + 256 + 2 * D + D) * size + 8
    rotary = 4 * tokens * (D // num_heads) * rope
    return Cost(
        parameters=depth * (_weights(of_token + of_condition) + gains)
        + _weights(once_token + once_condition)
        + (num_classes + 1) * D,
        position_embedding=tokens * D,
        multiply_adds=depth * (tokens * _products(of_token) + _products(of_condition) + attention)
        + tokens * _products(once_token)
        + _products(once_condition),
        block_bytes=one_block,
        activation_bytes=(depth - recomputed) * one_block
        + recomputed * tokens * D * size  # its input
        + once
        + rotary
        + one_norm
        + D * size,  # of the final layer
    )


def _norm_bytes(tokens: int, D: int, *, norm: str, size: int, inner_size: int) -> int:
    """Its input, which is the residual stream; normalised; scaled and shifted; 1 + scale."""
    statistics = 4 * tokens * {"layer": 2, "rms": 1}[norm]
    return tokens * D * (2 * inner_size + size) + statistics + D * inner_size


def _products(layers: list[tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in layers)


def _weights(layers: list[tuple[int, int]]) -> int:
    return sum((inputs + 1) * outputs for inputs, outputs in layers)


OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "as published": {},
    "qk_norm=true": {"qk_norm": True},
    "rope=true": {"rope": True},
    "mlp=swiglu": {"mlp": "swiglu"},
    "norm=rms": {"norm": "rms"},
    "fp32_norms=true": {"fp32_norms": True},
    "checkpoint_every=1": {"checkpoint_every": 1},
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
    print(
        f"{args.model}, latents of 4 channels and {size}: one image, forward; activations in bf16"
    )
    print(
        "option             | parameters  | more     | multiply-adds (G) | more (G) "
        "| activations (MB) | more (MB)"
    )
    for option, values in OPTIONS.items():
        this = cost(input_size=size, **sizes, **values)  # type: ignore[arg-type]
        total, more = this.parameters + this.position_embedding, this.parameters - first.parameters
        work, kept = this.multiply_adds / 1e9, this.activation_bytes / 1e6
        print(
            f"{option:18} | {total:11,} | {more:+8,} | {work:17.2f} | "
            f"{work - first.multiply_adds / 1e9:+8.2f} | {kept:16,.0f} | "
            f"{round(kept - first.activation_bytes / 1e6):+9,}"
        )


if __name__ == "__main__":
    main()
