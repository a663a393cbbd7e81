"""DiT: a transformer that denoises latents, conditioned by adaLN-Zero, and its zoo of sizes.

Parameter names are those of the published checkpoints, so their state dicts load unchanged. The
model draws nothing: noise, timesteps and dropped labels come from the objective.

Sources: Peebles & Xie 2023, "Scalable diffusion models with transformers" (architecture, sizes,
initialisation); Vaswani et al. 2017 and He et al. 2022 (sine-cosine embeddings).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_ds.layers import (
    AdaptiveNorm,
    Attention,
    Conv2d,
    Embedding,
    Linear,
    Mlp,
    SwiGLU,
    rotary_embedding,
)

# hidden_size, depth, num_heads. The paper's sizes, then two that need ZeRO-3: 3.08e9 and 6.98e9
# parameters at 256x256, of twice and three times the width of XL, with heads of 128 channels,
# which attention kernels like better than the 72 of XL.
_PAPER_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
_LARGE_SIZES = {"3B": (2304, 32, 18), "7B": (3584, 30, 28)}


def _sizes(patch_size: int, hidden_size: int, depth: int, num_heads: int) -> dict[str, int]:
    return dict(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)


DIT_MODELS: dict[str, dict[str, int]] = {
    f"DiT-{name}/{p}": _sizes(p, *size) for name, size in _PAPER_SIZES.items() for p in (2, 4, 8)
} | {f"DiT-{name}/2": _sizes(2, *size) for name, size in _LARGE_SIZES.items()}


def initial_value(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """First value of parameter `name`, float32 on the CPU, from its name, shape and the seed alone.

    So it does not matter in which order, on how many ranks or at which ZeRO stage parameters are
    made. Xavier-uniform weights (the patch embedding as a linear layer), N(0, 0.02) for the label
    table and the timestep MLP, ones for the gains of norms, and zeros for biases, modulations and
    the final layer, so that each block starts as the identity. Source: Peebles & Xie 2023,
    sections 3.2 (adaLN-Zero) and 4.
    """
    value = torch.zeros(shape, device="cpu")
    if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
        return value
    if name.endswith("_norm.weight"):
        return value.fill_(1.0)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    if name.startswith(("t_embedder", "y_embedder")):
        return value.normal_(0.0, 0.02, generator=generator)
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return value.uniform_(-bound, bound, generator=generator)


def sincos_pos_embed(hidden_size: int, grid_size: int | tuple[int, int]) -> np.ndarray:
    """(T, hidden_size) float32: half of the channels tell the column, half the row.

    grid_size: patches along each side, or (rows, columns).

    numpy, because ZeRO-3's `zero.Init` rounds whatever torch computes inside it to half precision.
    """
    high, wide = _sides(grid_size)
    omega = 10000.0 ** (-np.arange(hidden_size // 4) / (hidden_size // 4))
    angles = np.outer(np.arange(max(high, wide)), omega)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (longer side, D/2)
    columns, rows = np.tile(axis[:wide], (high, 1)), np.repeat(axis[:high], wide, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    high, wide = (size, size) if isinstance(size, int) else size
    return high, wide


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """(N, dim) float32, cosines then sines of t (N,) at `dim / 2` frequencies.

    Never in half precision: bf16 has 8 bits and cannot tell t = 998 from 1000.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) / half * steps)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class PatchEmbedder(nn.Module):
    """Images to tokens: one linear map of each patch."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, T, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps to vectors: 256 frequencies and an MLP."""

    def __init__(self, hidden_size: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(
            Linear(num_frequencies, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) to (N, D) in `dtype`, that of the weights."""
        return self.mlp(timestep_embedding(t, self.num_frequencies).to(dtype))


class LabelEmbedder(nn.Module):
    """Classes to vectors; the last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """(N,) to (N, D)."""
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: the condition shifts, scales and gates both branches."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool,
        mlp: str,
        norm: str,
        fp32_norms: bool,
    ) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(hidden_size, norm, fp32=fp32_norms)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm, fp32=fp32_norms)
        self.norm2 = AdaptiveNorm(hidden_size, norm, fp32=fp32_norms)
        self.mlp = {"gelu": Mlp, "swiglu": SwiGLU}[mlp](hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Tokens x (N, T, D) under the condition c (N, D), to (N, T, D)."""
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)  # each (N, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa.unsqueeze(1) * self.attn(self.norm1(x, shift_msa, scale_msa), rotary)
        return x + gate_mlp.unsqueeze(1) * self.mlp(self.norm2(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens to the values of their patches."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, *, norm: str, fp32_norms: bool
    ) -> None:
        super().__init__()
        self.norm_final = AdaptiveNorm(hidden_size, norm, fp32=fp32_norms)
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (N, T, D) under the condition c (N, D), to (N, T, p*p*C)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(self.norm_final(x, shift, scale))


class DiT(nn.Module):
    """Diffusion transformer over latents (in_channels, H, W); input_size is (H, W), or H = W.

    `null_class` (= num_classes) is the label that stands for "no label". `checkpoint_every=k`
    recomputes every k-th block in the backward pass instead of keeping its activations; 0 keeps
    all. Raises ValueError for sizes that do not fit each other. Can be built on the meta device.
    Source: Peebles & Xie 2023; the options' stand in `dit_ds.layers`.

    With `rope` the sine-cosine embedding stays: rotation tells attention how far apart two patches
    are, and not where in the image they lie.
    """

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int | Sequence[int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        *,
        qk_norm: bool = False,
        rope: bool = False,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        norm: Literal["layer", "rms"] = "layer",
        fp32_norms: bool = False,
        checkpoint_every: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(
            input_size,
            patch_size,
            hidden_size,
            num_heads,
            in_channels=in_channels,
            depth=depth,
            num_classes=num_classes,
        )
        if int(hidden_size * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio} leaves the MLP no channels; choose e.g. 4.0")
        channels = hidden_size // num_heads
        if rope and channels % 4:
            raise ValueError(
                f"rope=true needs heads of a multiple of 4 channels, two for each axis, and "
                f"hidden_size={hidden_size} with num_heads={num_heads} makes {channels}; choose "
                "other num_heads, or rope=false"
            )
        if checkpoint_every < 0:
            raise ValueError(
                f"checkpoint_every={checkpoint_every} must be 0 (off) or k >= 1 (every k-th block)"
            )
        self.latent_size = _sides(input_size)
        self.grid = (self.latent_size[0] // patch_size, self.latent_size[1] // patch_size)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes = num_classes
        self.null_class = num_classes
        self.learn_sigma = learn_sigma
        self.checkpoint_every = checkpoint_every
        self.rotary_channels = channels if rope else 0

        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # A buffer, not a frozen parameter: ZeRO keeps no optimizer state for those and breaks.
        pos_embed = torch.from_numpy(sincos_pos_embed(hidden_size, self.grid))
        device = self.x_embedder.proj.weight.device
        self.register_buffer("pos_embed", pos_embed.unsqueeze(0).to(device))  # (1, T, D)
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size,
                num_heads,
                mlp_ratio,
                qk_norm=qk_norm,
                mlp=mlp,
                norm=norm,
                fp32_norms=fp32_norms,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            hidden_size, patch_size, self.out_channels, norm=norm, fp32_norms=fp32_norms
        )
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(
        self,
        seed: int = 0,
        gather: Callable[[nn.Parameter], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Set every parameter to its `initial_value`.

        Inside ZeRO-3's `zero.Init` the parameters are already split into ranks' shares when
        `__init__` ends, and the meta device has no data at all: those are passed over. Under
        ZeRO-3 call it again with a `gather` that makes a parameter whole and writes it back:
        `lambda p: deepspeed.zero.GatheredParameters(p, modifier_rank=0)`.
        """
        for name, p in self.named_parameters():
            with gather(p):
                if p.numel() > 0 and not p.is_meta:
                    p.copy_(initial_value(name, tuple(p.shape), seed))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (N, T, p*p*C) back to images (N, C, H, W)."""
        (h, w), p = self.grid, self.patch_size
        x = x.reshape(-1, h, w, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, h * p, w * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Noise (and, with learn_sigma, variance) channels, in the dtype of the weights.

        x: (N, C, H, W) noisy latents; t: (N,) timesteps; y: (N,) classes, `null_class` for none.
        Returns (N, 2C, H, W), or (N, C, H, W) without learn_sigma. Raises ValueError if x has
        another shape than the model was built for.
        """
        C, (H, W) = self.in_channels, self.latent_size
        if x.shape[1:] != (C, H, W):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, this DiT expects (N, {C}, {H}, {W}); build it with "
                "the in_channels and input_size of the latents"
            )
        dtype = self.x_embedder.proj.weight.dtype
        x = self.x_embedder(x.to(dtype)) + self.pos_embed.to(dtype)  # (N, T, D)
        c = self.t_embedder(t, dtype) + self.y_embedder(y)  # (N, D)
        rotary = None
        if self.rotary_channels:
            rotary = rotary_embedding(self.grid, self.rotary_channels, x.device)
        for i, block in enumerate(self.blocks):
            if self.checkpoint_every and i % self.checkpoint_every == 0:
                # Non-reentrant: the reentrant form loses gradients where x needs none. No random
                # state to preserve, because nothing in a block is random. Without gradients this
                # is a plain call.
                x = checkpoint(block, x, c, rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, rotary)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c))  # (N, 2C or C, H, W)


def _check_sizes(
    input_size: int | Sequence[int],
    patch_size: int,
    hidden_size: int,
    num_heads: int,
    **others: int,
) -> None:
    """Raise ValueError for the first size that cannot work, and say what would."""
    high, wide = _sides(input_size)
    sizes = dict(
        input_size=min(high, wide),
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_heads=num_heads,
    )
    for name, value in (sizes | others).items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if high % patch_size or wide % patch_size:
        raise ValueError(
            f"input_size={input_size} is not a multiple of patch_size={patch_size}; "
            "choose a patch_size that divides the height and width of the latents"
        )
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; "
            "choose num_heads that divide it, 64 channels each as a rule"
        )
    if hidden_size % 4:
        raise ValueError(
            f"hidden_size={hidden_size} is not a multiple of 4, which the sines and cosines of "
            f"two axes need; choose {hidden_size + 4 - hidden_size % 4}"
        )
