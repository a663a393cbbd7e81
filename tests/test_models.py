"""The DiT is the published one, and stays itself under other dtypes, devices and checkpointing."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit_ds.models import DIT_MODELS, DiT, initial_value

GOLDEN = np.load(Path(__file__).parent / "data" / "dit_tiny.npz")
SIZES: dict[str, Any] = ast.literal_eval(str(GOLDEN["config"]))


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key])


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state/"): golden(k) for k in GOLDEN if k.startswith("state/")}


def golden_model(**options: Any) -> DiT:
    model = DiT(**SIZES, **options)
    model.load_state_dict(golden_state())
    return model


def golden_forward(model: DiT) -> Tensor:
    return model(golden("model/x"), golden("model/t"), golden("model/y"))


def num_parameters(model: DiT) -> int:
    return sum(p.numel() for p in model.parameters())


def test_forward_agrees_with_the_published_model() -> None:
    with torch.no_grad():
        out = golden_forward(golden_model())
    # 1e-5: another order of float32 sums.
    torch.testing.assert_close(out, golden("model/out"), rtol=1e-5, atol=1e-5)


def test_state_dict_has_the_published_keys_and_pos_embed_is_a_buffer() -> None:
    model = DiT(**SIZES)
    state, published = model.state_dict(), golden_state()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in published.items()}
    assert "pos_embed" in dict(model.named_buffers())
    assert "pos_embed" not in dict(model.named_parameters())
    torch.testing.assert_close(state["pos_embed"], published["pos_embed"], rtol=0, atol=1e-6)


def test_zoo_has_the_published_sizes() -> None:
    paper = {f"DiT-{s}/{p}" for s in ("S", "B", "L", "XL") for p in (2, 4, 8)}
    assert set(DIT_MODELS) == paper | {"DiT-3B/2", "DiT-7B/2"}
    count = {}
    with torch.device("meta"):
        for name, sizes in DIT_MODELS.items():
            options: dict[str, Any] = {"input_size": 32, "in_channels": 4, "num_classes": 1000}
            model = DiT(**options | sizes)
            assert all(p.is_meta for p in model.parameters())
            count[name] = num_parameters(model) + model.pos_embed.numel()
    # The literature counts the position embedding, which trains in nobody's model.
    assert count["DiT-XL/2"] == 675_129_632
    assert count["DiT-XL/2"] - 256 * 1152 == 674_834_720
    # The paper's, in millions.
    assert [count[f"DiT-{s}/2"] / 1e6 for s in "SBL"] == pytest.approx([33, 130, 458], abs=0.6)
    assert count["DiT-3B/2"] == pytest.approx(3e9, rel=0.05)
    assert count["DiT-7B/2"] == pytest.approx(7e9, rel=0.05)


def test_without_learn_sigma_there_are_only_noise_channels() -> None:
    model = DiT(**SIZES | {"learn_sigma": False})
    assert golden_forward(model).shape == (4, 4, 8, 8)


def test_first_output_is_zero_and_first_blocks_are_the_identity() -> None:
    model = DiT(**SIZES)
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    torch.testing.assert_close(model.blocks[0](x, c), x, rtol=0, atol=0)
    assert golden_forward(model).abs().max() == 0


def test_initial_values_depend_on_name_and_seed_alone() -> None:
    deep, shallow = DiT(**SIZES | {"depth": 3}), DiT(**SIZES)
    for name, p in shallow.named_parameters():
        assert torch.equal(p, deep.state_dict()[name]), name
        assert torch.equal(p, initial_value(name, tuple(p.shape), seed=0)), name
    shallow.initialize_weights(seed=1)
    qkv = "blocks.0.attn.qkv.weight"
    assert not torch.equal(shallow.state_dict()[qkv], deep.state_dict()[qkv])
    assert not torch.equal(deep.state_dict()[qkv], deep.state_dict()["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("name", "shape", "std"),
    [
        ("blocks.0.attn.qkv.weight", (384, 128), (2 / 512) ** 0.5),
        ("x_embedder.proj.weight", (128, 4, 8, 8), (2 / 384) ** 0.5),  # a linear layer of 256
        ("t_embedder.mlp.0.weight", (128, 256), 0.02),
        ("y_embedder.embedding_table.weight", (257, 128), 0.02),
        ("blocks.0.adaLN_modulation.1.weight", (768, 128), 0.0),
        ("final_layer.linear.weight", (32, 128), 0.0),
        ("blocks.0.mlp.fc1.bias", (512,), 0.0),
    ],
)
def test_initial_values_have_the_papers_spread(
    name: str, shape: tuple[int, ...], std: float
) -> None:
    value = initial_value(name, shape)
    assert value.std().item() == pytest.approx(std, rel=0.02)  # 5 standard errors at 30,000 draws
    assert abs(value.mean().item()) <= 5 * std / value.numel() ** 0.5


def test_parameters_that_hold_no_data_are_initialised_inside_gather() -> None:
    whole, split = DiT(**SIZES), DiT(**SIZES)
    data = {p: torch.full_like(p, float("nan")) for p in split.parameters()}
    for p in split.parameters():
        p.data = torch.empty(0)

    @contextlib.contextmanager
    def gather(p: nn.Parameter) -> Iterator[None]:
        p.data = data[p]
        yield
        p.data = torch.empty(0)

    split.initialize_weights()
    assert num_parameters(split) == 0
    split.initialize_weights(gather=gather)
    for (name, p), q in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert torch.equal(p, data[q]), name


def gradients(model: DiT) -> dict[str, Tensor]:
    golden_forward(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpoint_every", [1, 2])
def test_activation_checkpointing_changes_no_gradient(checkpoint_every: int) -> None:
    kept, recomputed = (
        gradients(golden_model()),
        gradients(golden_model(checkpoint_every=checkpoint_every)),
    )
    assert kept.keys() == recomputed.keys() == dict(golden_model().named_parameters()).keys()
    for name, grad in kept.items():
        assert torch.equal(grad, recomputed[name]), name
    # The latents need no gradient: a reentrant checkpoint would leave the first block without.
    assert recomputed["blocks.0.attn.qkv.weight"].abs().max() > 0


@pytest.mark.parametrize(("checkpoint_every", "recomputed"), [(0, 0), (1, 4), (2, 2), (3, 2)])
def test_every_kth_block_is_recomputed_and_none_without_gradients(
    checkpoint_every: int, recomputed: int
) -> None:
    model = DiT(**SIZES | {"depth": 4}, checkpoint_every=checkpoint_every)
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    golden_forward(model).mean().backward()
    assert len(calls) == 4 + recomputed
    calls.clear()
    with torch.no_grad():
        golden_forward(model)
    assert len(calls) == 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_weights_in_half_precision_take_float32_latents(
    dtype: torch.dtype, tolerance: float
) -> None:
    out = golden_forward(golden_model().to(dtype))
    assert out.dtype == dtype
    # About ten roundings of 2^-8 (bf16) and 2^-11 (fp16) in a row, in units of the output's scale.
    error = (out.float() - golden("model/out")).abs().max() / golden("model/out").abs().max()
    assert error < tolerance


def test_half_precision_weights_tell_neighbouring_timesteps_apart() -> None:
    # bf16 itself rounds 999 to 1000.
    embedder = golden_model().bfloat16().t_embedder
    one, other = embedder(torch.tensor([999, 1000]), torch.bfloat16)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_heads=4"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size=30 is not a multiple of 4"),
        ({"input_size": 9}, "input_size=9 is not a multiple of patch_size=2"),
        ({"depth": 0}, "depth=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**SIZES | sizes)


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 16, 16\).*\(N, 4, 8, 8\)"):
        DiT(**SIZES)(torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
