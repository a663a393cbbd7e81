"""What a model costs, from its sizes alone, is what torch counts and what the paper prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dit_ds import flops
from dit_ds.models import DIT_MODELS, DiT

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
    cost = flops.cost(**SIZES, **options)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.position_embedding == model.pos_embed.numel()
    assert 2 * cost.multiply_adds == counter.get_total_flops()


def test_the_published_figures_come_out() -> None:
    def xl(size: int) -> flops.Cost:
        return flops.cost(
            **DIT_MODELS["DiT-XL/2"], input_size=size, in_channels=4, num_classes=1000
        )

    assert xl(32).parameters + xl(32).position_embedding == 675_129_632
    # The paper prints one decimal, and does not say which of the small terms it counts.
    assert xl(32).multiply_adds / 1e9 == pytest.approx(118.6, abs=0.1)
    assert xl(64).multiply_adds / 1e9 == pytest.approx(524.5, abs=0.1)


def test_the_table_shows_every_option_and_sizes_as_given(capsys: pytest.CaptureFixture) -> None:
    flops.main(["--model", "DiT-S/2", "--input-size", "32", "16"])
    table = capsys.readouterr().out
    assert all(option in table for option in flops.OPTIONS) and "[32, 16]" in table
    S = flops.cost(**DIT_MODELS["DiT-S/2"], input_size=(32, 16), in_channels=4, num_classes=1000)
    assert f"{S.multiply_adds / 1e9:.2f}" in table
