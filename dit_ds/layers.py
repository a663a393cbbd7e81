"""The parts of a transformer block: attention, MLPs and norms, as published and as since then.

Each choice besides the published one is an option of `DiT`; the sources stand with the classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Unset:
    """Skips torch's random first values, which `initialize_weights` would overwrite.

    `skip_init` would do the same by way of the meta device, which zero.Init cannot partition.
    """

    def reset_parameters(self) -> None:
        pass


class Linear(_Unset, nn.Linear):
    """`nn.Linear` that leaves its first values to `DiT.initialize_weights`."""


class Conv2d(_Unset, nn.Conv2d):
    """`nn.Conv2d` that leaves its first values to `DiT.initialize_weights`."""


class Embedding(_Unset, nn.Embedding):
    """`nn.Embedding` that leaves its first values to `DiT.initialize_weights`."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift each channel of x (N, T, D) by the sample's own (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class AdaptiveNorm(nn.Module):
    """A norm of each token whose scale and shift come from the condition.

    kind: `layer`, or `rms`, which leaves the mean in (Zhang & Sennrich 2019, "Root mean square
    layer normalization"). With `fp32`, half-precision tokens are normalised, scaled and shifted in
    float32 and rounded once: 1 + scale alone has 8 bits in bf16, and a scale below 2^-8 no effect.
    """

    def __init__(self, hidden_size: int, kind: str, *, fp32: bool) -> None:
        super().__init__()
        make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind]
        self.norm = make(hidden_size, eps=1e-6, elementwise_affine=False)
        self.fp32 = fp32

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Tokens x (N, T, D), shift and scale (N, D), to (N, T, D) in the dtype of x."""
        if not self.fp32:
            return modulate(self.norm(x), shift, scale)
        return modulate(self.norm(x.float()), shift.float(), scale.float()).to(x.dtype)


class HeadNorm(_Unset, nn.RMSNorm):
    """RMS norm of each head's queries or keys, with a gain for each channel that heads share.

    It bounds the attention logits, whose growth makes large models diverge. Sources: Henry et al.
    2020, "Query-key normalization for transformers"; Dehghani et al. 2023, "Scaling vision
    transformers to 22 billion parameters", section 2 (layer norm there; RMS as in Esser et al.
    2024, "Scaling rectified flow transformers", section 5.3.2).
    """

    def __init__(self, channels: int, *, fp32: bool) -> None:
        super().__init__(channels, eps=1e-6)
        self.fp32 = fp32

    def forward(self, x: Tensor) -> Tensor:
        """(N, heads, T, D / heads), in its dtype, which is another than the gain's in autocast."""
        dtype = torch.float32 if self.fp32 else x.dtype
        weight = self.weight.to(dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, weight, self.eps).to(x.dtype)


def rotary_embedding(grid: tuple[int, int], channels: int, device: torch.device) -> Tensor:
    """(2, T, channels / 2) float32: cosines and sines by which each token's channels turn.

    The first half of the angles tells the row, the second the column. Never in half precision, as
    buffers would be. Sources: Su et al. 2021, "RoFormer", section 3.2.2; over two axes, with the
    lowest frequency 1/100 for the few positions of images, Heo et al. 2024, "Rotary position
    embedding for vision transformer", section 3.
    """
    high, wide = grid
    exponents = torch.arange(channels // 4, dtype=torch.float32, device=device) / (channels // 4)
    tokens = torch.arange(high * wide, device=device)
    places = torch.stack([tokens // wide, tokens % wide], dim=1)  # (T, 2)
    angles = (places[:, :, None] * 100.0**-exponents).flatten(1)  # (T, channels / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn channel pairs (i, i + channels / 2) of x (N, heads, T, channels) by a token's angles."""
    cos, sin = rotary
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool, fp32: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        channels = hidden_size // num_heads
        self.q_norm = HeadNorm(channels, fp32=fp32) if qk_norm else None
        self.k_norm = HeadNorm(channels, fp32=fp32) if qk_norm else None

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """(N, T, D) to (N, T, D); rotary: of `rotary_embedding`."""
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    """Two linear layers around a GELU (tanh form)."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        mlp_size = int(hidden_size * mlp_ratio)
        self.fc1 = Linear(hidden_size, mlp_size)
        self.fc2 = Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) to (N, T, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def swiglu_size(hidden_size: int, mlp_ratio: float) -> int:
    """Width of a `SwiGLU` with as many parameters as `Mlp`: 2/3 of it, in whole 64s for kernels."""
    return max(1, round(2 * int(hidden_size * mlp_ratio) / 3 / 64)) * 64


class SwiGLU(nn.Module):
    """An MLP whose hidden channels are gated by others. fc1 makes both: gates, then values.

    Source: Shazeer 2020, "GLU variants improve transformer", eq. 6.
    """

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        mlp_size = swiglu_size(hidden_size, mlp_ratio)
        self.fc1 = Linear(hidden_size, 2 * mlp_size)
        self.fc2 = Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) to (N, T, D)."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)
