"""What a model costs, from its sizes alone, is what torch counts and what the paper prints."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_ds import flops
from dit_ds.models import DIT_MODELS, DiT
from tests.conftest import REPO

SIZES: dict[str, Any] = {
    "input_size": (16, 8), "patch_size": 2, "in_channels": 4, "hidden_size": 192, "depth": 3,
    "num_heads": 4, "num_classes": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [*flops.OPTIONS.values(), {"learn_sigma": False, "mlp_ratio": 2.5, "mlp": "swiglu"}],
    ids=str,
)
def test_parameters_and_products_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = DiT(**SIZES, **options)
        x, t, y = torch.zeros(1, 4, 16, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    found = flops.cost(**SIZES, **options)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.position_embedding == model.pos_embed.numel()
    assert 2 * found.multiply_adds == counter.get_total_flops()


class FusedNorm(torch.autograd.Function):
    """Keeps what torch's CUDA kernels of `layer_norm` and `rms_norm` keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, layer: bool) -> Tensor:
        statistics = [x.float().mean(-1)] * layer + [x.float().square().mean(-1)]
        ctx.save_for_backward(x, weight, *statistics)
        return torch.clone(x, memory_format=torch.contiguous_format)


def fused_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "layer_norm", lambda x, *_: FusedNorm.apply(x, None, True))
    monkeypatch.setattr(
        F, "rms_norm", lambda x, shape, weight=None, eps=None: FusedNorm.apply(x, weight, False)
    )


def kept(sizes: dict[str, Any], dtype: torch.dtype, num: int = 1, device: str = "cpu") -> int:
    """Bytes that autograd keeps of a forward pass, besides parameters and buffers."""
    model = DiT(**sizes).to(device, dtype)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, Tensor] = {}  # which also keeps them, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, y = torch.zeros(num, sizes["in_channels"], *sizes["input_size"]), torch.zeros(num).long()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x.to(device), torch.zeros(num, device=device), y.to(device))
    return sum(t.untyped_storage().nbytes() for k, t in found.items() if k not in own)


HALF, FULL = torch.bfloat16, torch.float32
MODERN = {"qk_norm": True, "rope": True, "mlp": "swiglu", "norm": "rms"}


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
def test_activation_bytes_are_those_that_autograd_keeps(
    checkpoint_every: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused_norms(monkeypatch)
    names = ("qk_norm", "rope", "mlp", "norm", "fp32_norms")
    switches = (False, True)
    for values in itertools.product(
        switches, switches, ("gelu", "swiglu"), ("layer", "rms"), switches
    ):
        sizes = SIZES | {"hidden_size": 32} | dict(zip(names, values, strict=True))
        sizes["checkpoint_every"] = checkpoint_every
        assert flops.cost(**sizes, dtype=dtype).activation_bytes == kept(sizes, dtype), sizes


@pytest.mark.parametrize(
    "other",
    [
        {"input_size": (4, 12), "patch_size": 1, "in_channels": 3},
        {"hidden_size": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 2.5, "mlp": "swiglu"},
    ],
    ids=str,
)
def test_activation_bytes_of_other_sizes_and_of_torchs_own_norms(other: dict[str, Any]) -> None:
    sizes = SIZES | other
    assert flops.cost(**sizes, dtype=FULL).activation_bytes == kept(sizes, FULL)
    assert 3 * flops.cost(**sizes, dtype=FULL).activation_bytes == kept(sizes, FULL, num=3)


def test_block_bytes_are_what_one_more_block_keeps() -> None:
    one, two = (flops.cost(**SIZES | MODERN | {"depth": depth}) for depth in (1, 2))
    assert two.activation_bytes - one.activation_bytes == one.block_bytes == two.block_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize("options", [{}, MODERN, {"fp32_norms": True, "qk_norm": True}], ids=str)
def test_activation_bytes_on_a_gpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = SIZES | options
    # Attention also keeps the state of a random generator, and rounds its rows up.
    expected = flops.cost(**sizes, dtype=dtype).activation_bytes
    assert kept(sizes, dtype, device="cuda") == pytest.approx(expected, rel=0.01)


def cost(name: str, input_size: int | tuple[int, int]) -> flops.Cost:
    data: dict[str, Any] = {"input_size": input_size, "in_channels": 4, "num_classes": 1000}
    return flops.cost(**data | DIT_MODELS[name])


def test_the_published_figures_come_out() -> None:
    xl, large = cost("DiT-XL/2", 32), cost("DiT-XL/2", 64)
    assert xl.parameters + xl.position_embedding == 675_129_632
    # The paper prints one decimal, and does not say which of the small terms it counts.
    assert xl.multiply_adds / 1e9 == pytest.approx(118.6, abs=0.1)
    assert large.multiply_adds / 1e9 == pytest.approx(524.5, abs=0.1)


def test_the_table_shows_every_option_and_sizes_as_given(capsys: pytest.CaptureFixture) -> None:
    flops.main(["--model", "DiT-S/2", "--input-size", "32", "16"])
    table = capsys.readouterr().out
    assert all(option in table for option in flops.OPTIONS) and "[32, 16]" in table
    assert f"{cost('DiT-S/2', (32, 16)).multiply_adds / 1e9:.2f}" in table


def test_the_readme_says_what_the_table_says(capsys: pytest.CaptureFixture) -> None:
    flops.main([])
    text = (REPO / "README.md").read_text()
    rows = [[cell.strip("` ") for cell in line.strip("|").split("|")] for line in text.splitlines()]
    told = {row[0]: row[3:] for row in rows if len(row) == 6}
    first, *others = capsys.readouterr().out.splitlines()[2:]
    _, total, _, work, _, kept, _ = (cell.strip() for cell in first.split("|"))
    assert told["(none)"] == [total, work, kept]
    for line in others:
        option, _, more, _, more_work, _, more_kept = (cell.strip() for cell in line.split("|"))
        assert told[option] == [more, more_work, more_kept]
