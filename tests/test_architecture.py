"""The model's options are what their sources write, and train and sample as the default does."""

from __future__ import annotations

import copy
import io
import math
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from dit_ds import adopt, archive, config, export, layers, rundir, sampling
from dit_ds.manifest import Manifest
from dit_ds.models import DiT, sincos_pos_embed, timestep_embedding
from dit_ds.samplers import SamplerSettings, sample
from tests import runs
from tests.conftest import make_latents, run_ranks
from tests.test_sampling import factor_8, tool
from tests.test_train import plain_pytorch

SIZES: dict[str, Any] = {
    "input_size": (8, 4), "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2,
    "num_heads": 4, "num_classes": 3,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "qk_norm": True, "rope": True, "mlp": "swiglu", "norm": "rms", "fp32_norms": True,
}  # fmt: skip
EACH = [{}, *({name: value} for name, value in OPTIONS.items()), OPTIONS]


def trained(**options: Any) -> DiT:
    """A model none of whose parameters is zero or one any more."""
    model = DiT(**SIZES, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0, 0.2, generator=generator))
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 4, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.tensor([3.0, 700.0], dtype=dtype), torch.tensor([0, 3])


def reference(state: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """The forward pass of `inputs` in float64, sample after sample and head after head."""
    w = {name: value.double() for name, value in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def norm(x: Tensor, kind: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x: Tensor) -> Tensor:
        """Channel pairs as complex numbers, times e^(i place 100^(-k / 2))."""
        places = [(row, column) for row in range(4) for column in range(2)]
        angles = [[p[axis] * 100 ** (-k / 2) for axis in (0, 1) for k in (0, 1)] for p in places]
        pairs = torch.complex(x[:, :4], x[:, 4:]) * torch.exp(1j * torch.tensor(angles).double())
        return torch.cat([pairs.real, pairs.imag], 1)

    def attention(name: str, x: Tensor) -> Tensor:
        qkv, heads = linear(f"{name}.qkv", x), []
        for head in range(4):
            q, k, v = (qkv[:, i * 32 + head * 8 : i * 32 + head * 8 + 8] for i in range(3))
            if options.get("qk_norm"):
                q = norm(q, "rms") * w[f"{name}.q_norm.weight"]
                k = norm(k, "rms") * w[f"{name}.k_norm.weight"]
            if options.get("rope"):
                q, k = turned(q), turned(k)
            heads.append(torch.softmax(q @ k.T / math.sqrt(8), -1) @ v)
        return linear(f"{name}.proj", torch.cat(heads, 1))

    def mlp(name: str, x: Tensor) -> Tensor:
        h = linear(f"{name}.fc1", x)
        if options.get("mlp") == "swiglu":
            return linear(f"{name}.fc2", silu(h[:, :64]) * h[:, 64:])
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return linear(f"{name}.fc2", gelu)

    kind, out = options.get("norm", "layer"), []
    for image, t, y in zip(*inputs(torch.float64), strict=True):
        patches = image.reshape(4, 4, 2, 2, 2).permute(1, 3, 0, 2, 4).reshape(8, 16)
        x = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"]
        x = x + w["pos_embed"][0]
        times = timestep_embedding(t[None])[0].double()
        c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", times)))
        c = silu(c + w["y_embedder.embedding_table.weight"][y])
        for i in range(2):
            m = linear(f"blocks.{i}.adaLN_modulation.1", c).view(6, 32)
            h = norm(x, kind) * (1 + m[1]) + m[0]
            x = x + m[2] * attention(f"blocks.{i}.attn", h)
            h = norm(x, kind) * (1 + m[4]) + m[3]
            x = x + m[5] * mlp(f"blocks.{i}.mlp", h)
        m = linear("final_layer.adaLN_modulation.1", c).view(2, 32)
        x = linear("final_layer.linear", norm(x, kind) * (1 + m[1]) + m[0])
        out.append(x.view(4, 2, 2, 2, 8).permute(4, 0, 2, 1, 3).reshape(8, 8, 4))
    return torch.stack(out)


@pytest.mark.parametrize("options", EACH, ids=str)
def test_each_option_is_what_its_source_writes(options: dict[str, Any]) -> None:
    model = trained(**options)
    with torch.no_grad():
        out = model(*inputs())
    expected = reference(model.state_dict(), options)
    # float32, in units of an output of about 10.
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", EACH, ids=str)
def test_the_first_output_is_zero_whatever_the_options(options: dict[str, Any]) -> None:
    model = DiT(**SIZES, **options)
    assert model(*inputs()).abs().max() == 0
    x, c = torch.randn(2, 8, 32), torch.randn(2, 32)
    rotary = layers.rotary_embedding((4, 2), 8, x.device) if "rope" in options else None
    assert torch.equal(model.blocks[0](x, c, rotary), x)


@pytest.mark.parametrize("options", EACH, ids=str)
def test_activation_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    grads = []
    for every in (0, 1):
        model = trained(**options)
        model.checkpoint_every = every
        model(*inputs()).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads[0].values())
    runs.assert_same_bits(*grads)  # type: ignore[arg-type]


def test_attention_with_rotation_sees_how_far_apart_patches_are_and_not_where() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator)
    rotary = layers.rotary_embedding((5, 7), 16, torch.device("cpu"))
    turned = [layers.rotate(v.expand(1, 1, 35, 16), rotary)[0, 0] for v in (q, k)]
    logits = (turned[0] @ turned[1].T).view(5, 7, 5, 7)
    for rows, columns in ((0, 1), (1, 0), (2, -3)):
        shifted = [
            logits[r, c, r + rows, c + columns]
            for r in range(5 - rows)
            for c in range(max(0, -columns), 7 - max(0, columns))
        ]
        assert torch.stack(shifted).std() < 1e-5
    assert logits[0, 0, 0, 1] != pytest.approx(logits[0, 0, 1, 0].item(), abs=1e-3)


def test_norms_in_float32_keep_what_bf16_loses() -> None:
    model = trained(**OPTIONS | {"fp32_norms": False})
    careful = trained(**OPTIONS)
    with torch.no_grad():
        assert torch.equal(model(*inputs()), careful(*inputs()))  # nothing to keep
    # A scale that bf16 cannot tell from none next to 1.
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    scale, shift = torch.full((2, 32), 2.0**-9).bfloat16(), torch.full((2, 32), 0.3).bfloat16()
    rounded, kept = (
        layers.AdaptiveNorm(32, "rms", fp32=fp32)(x, shift, scale).double()
        for fp32 in (False, True)
    )
    X = x.double()
    norm = X / (X.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = norm * (1 + 2.0**-9) + shift[0, 0].double()
    # One rounding is 2^-8 of the value at most, and float32's own error stands beside it.
    assert ((kept - expected).abs() <= expected.abs() * 2.0**-8 + 1e-6).all()
    assert (rounded - expected).square().mean() > 2 * (kept - expected).square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | {"fp32_norms": False}], ids=str)
def test_options_work_in_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = trained(**options)
    with torch.no_grad():
        expected = model(*inputs())
        out = copy.deepcopy(model).to(dtype)(*inputs())
        with torch.autocast("cpu", dtype):
            autocast = model(*inputs())
    assert out.dtype == dtype
    for found in (out, autocast):
        assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_positions_of_a_grid_are_those_of_the_square_around_it() -> None:
    square = sincos_pos_embed(32, 5).reshape(5, 5, 32)
    assert np.array_equal(sincos_pos_embed(32, (5, 3)).reshape(5, 3, 32), square[:, :3])
    assert np.array_equal(sincos_pos_embed(32, (2, 5)).reshape(2, 5, 32), square[:2])
    assert np.array_equal(sincos_pos_embed(32, (5, 5)), sincos_pos_embed(32, 5))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rope": True, "hidden_size": 24}, "rope=true needs .*num_heads=4 makes 6; choose"),
        ({"input_size": (8, 5)}, r"input_size=\(8, 5\) is not a multiple of patch_size=2"),
        ({"input_size": (0, 8)}, "input_size=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**SIZES | sizes)


def test_latents_on_their_side_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 4, 8\).*\(N, 4, 8, 4\)"):
        DiT(**SIZES)(torch.zeros(2, 4, 4, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))


@pytest.fixture
def modern(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The `tiny` recipe with every option, activation checkpointing and latents of 6x4."""
    tree = tiny["tree"]
    tree["model"] |= OPTIONS | {"checkpoint_every": 1}
    tree["data"]["path"] = str(tmp_path / "wide")
    make_latents(tmp_path / "wide", size=(6, 4))
    tiny["recipe"].write_text(yaml.safe_dump(tree))
    return tiny


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_follow_the_curve_of_one_plain_pytorch_process(
    modern: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    ds_config = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": stage}})
    run_ranks(2, runs.train, *runs.arguments(modern, ds_config))
    expected, weights = plain_pytorch(config.load(str(modern["recipe"])))
    # Only the order of float32 sums differs.
    assert runs.losses(modern["run"]) == pytest.approx(expected, rel=1e-5)
    state = runs.state_of(modern["run"], 6)
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=2e-5, msg=name)
    # Sampling rebuilds that model: from the run, and from an exported file.
    found = export.from_run(modern["run"])
    export.save(found, tmp_path / "ema.safetensors")
    again = export.load(tmp_path / "ema.safetensors")
    assert {k: getattr(again.about.model, k) for k in OPTIONS} == OPTIONS
    assert again.about.image_shape == (48, 32)
    settings, classes = SamplerSettings(sampler="ddim", steps=2, cfg_scale=2.0), torch.arange(3)
    shape = again.about.latent_shape
    one, other = (
        sample(
            w.build(),
            sampling.objective_of(w.about),
            settings,
            classes=classes,
            latent_shape=shape,
        )
        for w in (found, again)
    )
    assert one.shape == (3, 4, 6, 4) and torch.equal(one, other)


def test_pictures_of_latents_that_are_not_square(modern: dict[str, Any], tmp_path: Path) -> None:
    ds_config, vae = runs.write_json(tmp_path / "ds.json", {}), factor_8(tmp_path)
    preview = ["preview.every=6", f"preview.vae={vae}", "preview.steps=2", "preview.per_class=2"]
    run_ranks(1, runs.train, *runs.arguments(modern, ds_config, *preview))
    with Image.open(modern["run"] / "samples" / "step-00000006.png") as shown:
        wide, high = shown.size
    # Rows of 2 images, a row for each of 3 classes; small images are shown twice as large.
    assert 2 * 64 <= wide < 3 * 64 and 3 * 96 <= high < 4 * 96
    outputs = ["--npz", str(tmp_path / "x.npz"), "--out", str(tmp_path / "x.png")]
    arguments = ["--run", str(modern["run"]), "--vae", str(vae), "--steps", "2"]
    run_ranks(1, tool, "sample", *arguments, "--per-class", "1", *outputs)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as images:
        assert images["arr_0"].shape == (3, 48, 32, 3)


def test_latents_of_others_need_not_be_square(tmp_path: Path) -> None:
    for i in range(2):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            data = io.BytesIO()
            np.save(data, np.full((4, 6, 4), i, np.float16))
            member = tarfile.TarInfo(f"{i}.npy")
            member.size = data.tell()
            tar.addfile(member, io.BytesIO(data.getvalue()))
    made = adopt.index(tmp_path, vae=adopt.Vae(0.5), image_size=32, values="latents", workers=1)
    assert made.manifest.latent_shape == (4, 6, 4) and made.manifest.image_shape == (48, 32)
    with pytest.raises(ValueError, match="image_size=33 does not fit .* shorter side"):
        (tmp_path / "manifest.json").unlink()
        adopt.index(tmp_path, vae=adopt.Vae(0.5), image_size=33, values="latents", workers=1)


def test_a_run_that_knows_no_options_is_of_the_published_model_and_goes_on(
    tiny: dict[str, Any],
) -> None:
    cfg = config.load(str(tiny["recipe"]))
    about = rundir.describe(cfg, {}, Manifest.load(cfg.data.path))
    old = copy.deepcopy(about)
    for name in OPTIONS:
        del old["weights"]["model"][name], old["config"]["model"][name]
    found = archive.Checkpoint(tiny["run"], SimpleNamespace(about=old))  # type: ignore[arg-type]
    rundir.check_resume(found, cfg, about, tiny["run"])
    for name, value in OPTIONS.items():
        other = config.load(str(tiny["recipe"]), [f"model.{name}={value}"])
        with pytest.raises(ValueError, match=f"model.{name}={value} .was"):
            rundir.check_resume(found, other, about, tiny["run"])
    model = export.Sizes.model_validate(old["weights"]["model"])
    assert model.model_dump() == about["weights"]["model"]
    assert DiT(**model.model_dump()).state_dict().keys() == DiT(**SIZES).state_dict().keys()
