"""What a model costs, from its sizes alone, is what torch counts and what the paper prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
    told = {row[0]: row[3:5] for row in rows if len(row) == 5}
    first, *others = capsys.readouterr().out.splitlines()[2:]
    _, total, _, work, _ = (cell.strip() for cell in first.split("|"))
    assert told["(none)"] == [total, work]
    for line in others:
        option, _, more, _, more_work = (cell.strip() for cell in line.split("|"))
        assert told[option] == [more, more_work]
