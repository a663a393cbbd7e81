"""Weights move in and out, bitwise, and diffusers computes the same with them."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_ds import archive, exchange, export, layouts, published
from dit_ds.card import model_card
from dit_ds.export import Description, Sizes, Weights
from dit_ds.layouts import Unsaid
from dit_ds.models import DIT_MODELS, DiT
from dit_ds.settings import Objective
from tests import runs
from tests.conftest import REPO

NOTHING = Unsaid()


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE whose latents are as large as images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        mid_block_add_attention=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def weights(vae: Path | str = "none/none", num_classes: int = 3, **changes: Any) -> Weights:
    """Random weights, with names that a pipeline does not cut."""
    sizes = dict(
        input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=3,
        num_classes=num_classes, mlp_ratio=4.0, learn_sigma=True,
    ) | {k: v for k, v in changes.items() if k not in ("objective", "shift_factor")}  # fmt: skip
    model = DiT(**sizes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    about = Description(
        model=Sizes.model_validate(sizes), latent_shape=(4, *model.latent_size),
        scaling_factor=0.5, shift_factor=changes.get("shift_factor", 0.0),
        image_size=min(model.latent_size),
        class_names=[f"class {i}" for i in range(num_classes)],
        objective=Objective.model_validate(changes.get("objective", {})), step=7, vae=str(vae),
        vae_sha256="", dataset="tests", images_seen=84, metrics={"validation/loss": 0.25},
        ema_decay=0.99,
    )  # fmt: skip
    return Weights({k: v.detach() for k, v in model.state_dict().items()}, about)


def same(a: Weights, b: Weights) -> None:
    runs.assert_same_bits(a.state, b.state)
    assert a.about == b.about


LAYOUTS = ["w.safetensors", "w.pt", "folder"]


@pytest.mark.parametrize("num_classes", [1, 3, 1000, 1003])
def test_every_direction_is_bitwise(vae: Path, tmp_path: Path, num_classes: int) -> None:
    first = weights(vae, num_classes, learn_sigma=num_classes != 3)
    # The published embedding differs from ours in the last bits: that travels too.
    first.state["pos_embed"] += 1e-6
    for a, b in itertools.permutations(LAYOUTS, 2):
        there, back = tmp_path / f"{a}-{b}" / a, tmp_path / f"{a}-{b}" / "back" / b
        exchange.write(first, there)
        exchange.write(exchange.read(there, NOTHING), back)
        same(exchange.read(back, NOTHING), first)


def images_of(pipeline: Any, labels: list[int], steps: int = 3) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        class_labels=labels, guidance_scale=2.0, num_inference_steps=steps, output_type="pt",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip


def inputs(num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y with the last class and the null class among them."""
    generator = torch.Generator().manual_seed(2)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    y = torch.tensor([0, num_classes - 1, num_classes, 0, num_classes, num_classes - 1])
    return torch.randn(6, 4, 8, 8, generator=generator), t, y


def row(y: Tensor, num_classes: int) -> Tensor:
    return torch.where(y == num_classes, 1000, y + (y >= 1000).long())


@pytest.mark.parametrize("num_classes", [3, 1003])
def test_a_pipeline_computes_our_forward_and_the_naive_one_does_not(
    vae: Path, tmp_path: Path, num_classes: int
) -> None:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    import dit_ds.diffusers_model

    first = weights(vae, num_classes)
    exchange.write(first, tmp_path / "folder")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "folder")
    assert type(pipeline.transformer) is dit_ds.diffusers_model.PublishedDiT
    x, t, y = inputs(num_classes)
    with torch.no_grad():
        ours = first.build()(x, t, y)
        theirs = pipeline.transformer(x, t, class_labels=row(y, num_classes)).sample
        config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
        assert config.pop("num_classes") == num_classes  # which is ours alone
        naive = DiTTransformer2DModel(**config | {"norm_eps": 1e-5}).eval()
        state = pipeline.transformer.state_dict()
        naive.load_state_dict({k: v for k, v in state.items() if k != "pos_embed.pos_embed"})
        wrong = naive(x, t, class_labels=row(y, num_classes)).sample
    assert 0.1 < ours.abs().max() < 100
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    # As the same tensors in diffusers' own class: far off, wherever t is not small.
    errors = (wrong - ours).abs().amax(dim=(1, 2, 3))
    assert errors[2:].min() > 1e-2, errors
    # The null class of the pipeline is ours, and its classes have their names.
    last = pipeline.get_label_ids([f"class {num_classes - 1}"])
    images = images_of(pipeline, last)
    assert images.shape == (1, 3, 8, 8) and torch.isfinite(images).all()
    seen: list[Tensor] = []
    table = pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder
    table.register_forward_hook(lambda module, args, out: seen.append(out))
    images_of(pipeline, last)
    rows = first.state["y_embedder.embedding_table.weight"]
    torch.testing.assert_close(seen[0], rows[[num_classes - 1, num_classes]], rtol=0, atol=0)


def test_a_stock_folder_is_right_at_its_steps(vae: Path, tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    first = weights(vae)
    exchange.write(first, tmp_path / "exact")
    exchange.write(first, tmp_path / "stock", num_steps=50)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "stock")
    assert type(pipeline.transformer).__module__.startswith("diffusers.")
    pipeline.scheduler.set_timesteps(50)
    t = pipeline.scheduler.timesteps
    x, y = torch.randn(50, 4, 8, 8), torch.arange(50) % 4
    with torch.no_grad():
        ours = first.build()(x, t, y)
        theirs = pipeline.transformer(x, t, class_labels=row(y, 3)).sample
    # The fold is exact but for float32: sums of 256 products, some of large weights.
    torch.testing.assert_close(theirs, ours, rtol=3e-4, atol=3e-4)
    with pytest.raises(ValueError, match="right for some timesteps only"):
        exchange.read(tmp_path / "stock", NOTHING)
    with pytest.raises(ValueError, match="--stock-steps 500: .* choose fewer"):
        exchange.write(first, tmp_path / "more", num_steps=500)
    assert not (tmp_path / "more").exists()
    assert "For 50 steps" in (tmp_path / "stock" / "README.md").read_text()


def test_folders_that_others_wrote_are_read(vae: Path, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(3)
    DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=7,
    ).save_pretrained(tmp_path / "transformer")  # fmt: skip
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="has another timestep_embedder"):
        exchange.read(tmp_path, NOTHING)  # what was just drawn is another one in each block
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for name in [name for name in state if ".1.norm1.emb" in name]:
        state[name] = state[name.replace(".1.", ".0.", 1)].clone()
    save_file(state, path)
    found = exchange.read(tmp_path, NOTHING)
    assert found.about.num_classes == 7 and found.about.model.num_heads == 3
    table = state["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"]
    assert torch.equal(found.state["y_embedder.embedding_table.weight"], table)


@pytest.fixture(scope="module")
def strange(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without our description, and without a position embedding."""
    folder = tmp_path_factory.mktemp("strange") / "folder"
    exchange.write(weights(vae), folder)
    (folder / "dit_ds.json").unlink()
    (path,) = folder.glob("transformer/*.safetensors")
    state = load_file(path)
    del state["pos_embed.pos_embed"]
    save_file(state, path)
    return folder


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("transformer/config.json", {"sample_size": 4_000_000}, "sample_size"),
        ("transformer/config.json", {"sample_size": 1024}, "is not 1 to 256 patches"),
        ("transformer/config.json", {"num_embeds_ada_norm": 10**10}, "num_embeds_ada_norm"),
        ("transformer/config.json", {"num_embeds_ada_norm": 999}, "1001 rows of labels"),
        ("transformer/config.json", {"num_embeds_ada_norm": "3"}, "num_embeds_ada_norm"),
        ("transformer/config.json", {"num_embeds_ada_norm": None}, "num_embeds_ada_norm"),
        ("transformer/config.json", {"num_embeds_ada_norm": 3.0}, "num_embeds_ada_norm"),
        ("transformer/config.json", {"attention_head_dim": 2**19}, "tensors have 48"),
        ("transformer/config.json", {"patch_size": 4}, "a sample_size of 8, its tensors .* 4"),
        ("transformer/config.json", {"norm_type": "layer_norm"}, "norm_type"),
        ("vae/config.json", {"scaling_factor": "0.5"}, "scaling_factor"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor"),
        ("scheduler/scheduler_config.json", {"prediction_type": ["v"]}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "beta_schedule"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1}, "num_train_timesteps"),
    ],
    ids=str,
)
def test_what_a_strangers_folder_claims_is_not_believed(
    strange: Path, name: str, change: dict[str, Any], sentence: str
) -> None:
    text = (strange / name).read_text()
    (strange / name).write_text(json.dumps(json.loads(text) | change))
    try:
        with pytest.raises(ValueError, match=sentence) as error:
            exchange.read(strange, NOTHING)
        assert str(strange) in str(error.value)
    finally:
        (strange / name).write_text(text)


@pytest.mark.parametrize("num_classes", [3, 1003])
def test_a_folder_that_diffusers_saved_anew_is_the_same(
    vae: Path, tmp_path: Path, num_classes: int, recwarn: Any, capfd: Any
) -> None:
    import diffusers

    import dit_ds.diffusers_model

    first = weights(vae, num_classes)
    exchange.write(first, tmp_path / "ours")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert isinstance(pipeline.transformer, dit_ds.diffusers_model.PublishedDiT)
    assert "not expected and will be ignored" not in capfd.readouterr().err
    pipeline.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "dit_ds.json").exists()
    found = exchange.read(tmp_path / "theirs", NOTHING)
    runs.assert_same_bits(found.state, first.state)
    assert found.about.model == first.about.model
    assert found.about.num_classes == num_classes  # their names are lost


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-B/4", "DiT-XL/2"])
def test_tensors_alone_tell_what_they_are(name: str) -> None:
    sizes: dict[str, Any] = dict(DIT_MODELS[name])
    with torch.device("meta"):
        model = DiT(32, in_channels=4, num_classes=1000, **sizes)
    about = layouts.describe(model.state_dict(), NOTHING, "x.pt")
    with torch.device("meta"):
        again = DiT(**about.model.model_dump())
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert about.model.num_heads == sizes["num_heads"]
    assert (about.image_size, about.vae) == (256, "stabilityai/sd-vae-ft-ema")
    assert about.scaling_factor == 0.18215 and not about.dataset and not about.vae_sha256


def test_files_of_public_trainers_are_read(tmp_path: Path) -> None:
    first, path = weights(), tmp_path / "0400000.pt"
    other = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in first.state.items()}
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    torch.save({"model": other, "ema": first.state, "opt": {"state": {}}, "args": args}, path)
    with pytest.raises(ValueError, match="give --num-heads"):
        exchange.read(path, NOTHING)
    found = exchange.read(path, Unsaid(num_heads=3, class_names=["a", "b", "c"]))
    runs.assert_same_bits(found.state, first.state)
    assert found.about.class_names == ["a", "b", "c"]
    assert not first.build().training
    with pytest.raises(ValueError, match="2 class names given, the model has 3"):
        exchange.read(path, Unsaid(num_heads=3, class_names=["a", "b"]))
    torch.save({"model": {k: v.half() for k, v in other.items()}}, path)
    zeros = exchange.read(path, Unsaid(num_heads=3)).state  # no average: the weights
    assert zeros.keys() == first.state.keys() and not any(v.any() for v in zeros.values())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04 no zip", "damaged"),
        ({"x": Bomb()}, "more than tensors, which is not loaded"),
        ([1, 2], "no dictionary of tensors"),
        ({"x": 3}, "'x' is no tensor"),
        ({"x": torch.zeros(2)}, "not the tensors of a published DiT"),
        ({"blocks": torch.zeros(2)}, "not the tensors of a published DiT"),
        ({"x": torch.zeros(1).half().expand(2**37)}, "'x' claims .* does not hold so many"),
        ({"x": torch.zeros(0, 2**40)}, "'x' is no tensor of numbers"),
        ({"x": torch.zeros(2, dtype=torch.float64)}, "'x' is float64; save it in float32"),
    ],
    ids="empty zip bomb list number other block stride nothing double".split(),
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: Any, sentence: str
) -> None:
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=sentence) as error:
        exchange.read(path, NOTHING)
    assert str(path) in str(error.value) and "it ran" not in capfd.readouterr().out


def test_a_file_with_other_tensors_than_it_says_is_refused(tmp_path: Path) -> None:
    first = weights()
    exchange.write(first, tmp_path / "x.pt")
    published.save(weights(num_classes=4), tmp_path / "y.pt")
    (tmp_path / "x.pt.json").write_bytes((tmp_path / "y.pt.json").read_bytes())
    with pytest.raises(ValueError, match="x.pt: the weights do not fit their description") as error:
        exchange.read(tmp_path / "x.pt", NOTHING)
    [row] = str(error.value).splitlines()[1:]
    assert re.fullmatch(r"  misshapen +y_embedder\S+ +\[4, 48\], expected \[5, 48\]", row)
    (tmp_path / "x.pt.json").unlink()
    state = {k: v for k, v in first.state.items() if k != "blocks.1.attn.proj.bias"}
    torch.save(state | {"extra": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="do not fit") as error:
        exchange.read(tmp_path / "x.pt", Unsaid(num_heads=3))
    rows = [line.split()[:2] for line in str(error.value).splitlines()[1:]]
    assert rows == [["missing", "blocks.1.attn.proj.bias"], ["unexpected", "extra"]]
    (tmp_path / "x.pt.json").write_text("{")
    with pytest.raises(ValueError, match="x.pt: damaged"):
        exchange.read(tmp_path / "x.pt", NOTHING)


@pytest.mark.parametrize("error", [IndexError, AssertionError, TypeError, struct.error, KeyError])
def test_whatever_a_damaged_file_raises_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    (tmp_path / "x.pt").write_bytes(b"x")

    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match=r"x\.pt: damaged, or it holds more than tensors"):
        exchange.read(tmp_path / "x.pt", NOTHING)


def test_a_published_file_is_not_described_by_its_neighbours(tmp_path: Path) -> None:
    first, other = weights(), weights(num_classes=4)
    exchange.write(first, tmp_path / "ema.safetensors")
    exchange.write(other, tmp_path / "ema.pt")
    same(exchange.read(tmp_path / "ema.safetensors", NOTHING), first)
    same(exchange.read(tmp_path / "ema.pt", NOTHING), other)
    (tmp_path / "ema.pt.json").unlink()
    assert exchange.read(tmp_path / "ema.pt", Unsaid(num_heads=3)).about.class_names[0] == "0"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "folder"])
def test_all_that_does_not_fit_is_told(vae: Path, tmp_path: Path, name: str) -> None:
    exchange.write(weights(vae), tmp_path / name)
    path = tmp_path / name
    if name == "folder":
        (path,) = path.glob("transformer/*.safetensors")
    state = torch.load(path) if path.suffix == ".pt" else load_file(path)
    missing = sorted(n for n in state if n.endswith(("proj_out_1.bias", "linear.bias")))[:2]
    extra = {"extra": torch.zeros(2), f"{missing[0].split('.')[0]}.9999999.x": torch.zeros(1)}
    state = {n: v for n, v in state.items() if n not in missing} | extra
    torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)
    with pytest.raises(ValueError, match=f"{name}: ") as error:
        exchange.read(tmp_path / name, NOTHING)
    rows = {tuple(row.split()[:2]) for row in str(error.value).splitlines()[1:]}
    assert rows >= {("missing", n) for n in missing} | {("unexpected", n) for n in extra}


INEXPRESSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"qk_norm": True}, "model.qk_norm=true"),
    ({"rope": True}, "model.rope=true"),
    ({"mlp": "swiglu"}, "model.mlp=swiglu"),
    ({"norm": "rms"}, "model.norm=rms"),
    ({"fp32_norms": True}, "model.fp32_norms=true"),
    ({"input_size": (8, 4)}, "latents of 8x4"),
    ({"shift_factor": 0.1}, "a shift of latents, 0.1"),
    ({"objective": {"name": "flow"}, "learn_sigma": False}, "objective.name=flow"),
]


@pytest.mark.parametrize(("changes", "named"), INEXPRESSIBLE, ids=[n for _, n in INEXPRESSIBLE])
def test_what_a_layout_cannot_express_is_refused_by_name(
    vae: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    first = weights(vae, **changes)
    for name in ("w.pt", "folder"):
        with pytest.raises(ValueError, match=named):
            exchange.write(first, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    exchange.write(first, tmp_path / "w.safetensors")
    same(exchange.read(tmp_path / "w.safetensors", NOTHING), first)


@pytest.mark.parametrize(
    "objective", [{}, {"prediction": "v"}, {"schedule": "cosine", "num_timesteps": 500}], ids=str
)
def test_a_folders_scheduler_is_the_trainings(
    vae: Path, tmp_path: Path, objective: dict[str, Any]
) -> None:
    from diffusers import DDIMScheduler

    from dit_ds.ddpm import DDPM
    from dit_ds.sampling import objective_of

    first, folder = weights(vae, objective=objective), tmp_path / "folder"
    exchange.write(first, folder)
    scheduler, ddpm = DDIMScheduler.from_pretrained(folder / "scheduler"), objective_of(first.about)
    assert isinstance(ddpm, DDPM)
    signal = ddpm.schedule.alphas_cumprod
    # Theirs is computed in float32.
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), signal, rtol=3e-4, atol=1e-9)
    x, out = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler.set_timesteps(ddpm.num_timesteps)
    t = torch.tensor([ddpm.num_timesteps // 2])
    there = scheduler.step(out, int(t), x).pred_original_sample
    here = ddpm.schedule.predict_x_start(x, t, ddpm.eps(out, x, t))
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
    (folder / "dit_ds.json").unlink()
    of_others = exchange.read(folder, NOTHING)
    assert of_others.about.objective == first.about.objective
    (path,) = (folder / "transformer").glob("*.safetensors")
    torch.save(load_file(path), path.with_suffix(".bin"))  # as older versions of diffusers wrote
    path.unlink()
    same(exchange.read(folder, NOTHING), of_others)
    if objective:
        with pytest.raises(ValueError) as error:
            exchange.write(first, tmp_path / "w.pt")
        assert all(f"objective.{name}={v}" in str(error.value) for name, v in objective.items())


def test_the_card_tells_what_is_known_and_what_is_not(vae: Path, tmp_path: Path) -> None:
    first = weights(vae)
    exchange.write(first, tmp_path / "known")
    card = (tmp_path / "known" / "README.md").read_text()
    for told in ("7 steps, 84 images", "decay 0.99", "validation/loss 0.25", "10% of the labels"):
        assert told in card, told
    assert "prediction eps, schedule linear, learned variance" in card and "`tests`" in card
    exchange.write(first, tmp_path / "w.pt")
    (tmp_path / "w.pt.json").unlink()
    strange = exchange.read(tmp_path / "w.pt", Unsaid(vae=str(vae), num_heads=3, image_size=8))
    exchange.write(strange, tmp_path / "unknown")
    card = (tmp_path / "unknown" / "README.md").read_text()
    assert "| data set | unknown |" in card and "| trained for | unknown |" in card
    assert "assumed" in card and "none is known" in card and "unknown how many labels" in card


def test_older_files_do_not_tell_how_many_labels_were_dropped(vae: Path, tmp_path: Path) -> None:
    first, path = weights(vae), tmp_path / "w.safetensors"
    exchange.write(first, path)
    tree = json.loads(path.with_suffix(".json").read_text())
    tree["num_timesteps"] = tree.pop("objective")["num_timesteps"]  # as it was written then
    del tree["class_dropout_known"]
    path.with_suffix(".json").write_text(json.dumps(tree))
    exchange.write(exchange.read(path, NOTHING), tmp_path / "again.safetensors")
    found = exchange.read(tmp_path / "again.safetensors", NOTHING).about
    card = model_card(found, num_parameters=1, vae_told="")
    assert "unknown how many labels" in card and "10% of the labels" not in card
    # A checkpoint has the run's settings beside such a description.
    for dropout, known in ((0.25, True), (None, False), (7.0, False)):
        about = {"weights": tree, "config": {"objective": {"class_dropout": dropout}}}
        run = archive.Checkpoint(tmp_path, SimpleNamespace(about=about))  # type: ignore[arg-type]
        card = model_card(export._described(run), num_parameters=1, vae_told="")
        assert ("25% of the labels" in card, "unknown how many labels" in card) == (
            known, not known,
        )  # fmt: skip


def test_folders_are_written_whole_or_not_at_all(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="it is there already"):
        exchange.write(weights(vae), tmp_path / "there")
    with pytest.raises(ValueError, match="no such folder"):
        exchange.write(weights("no"), tmp_path / "new")
    with pytest.raises(
        ValueError,
        match=r"latents of \(4, 64, 64\) of \(64, 64\) pixels, the model's are \(4, 8, 8\)",
    ):
        wide = weights(vae)
        about = wide.about.model_copy(update={"image_size": 64})
        exchange.write(Weights(wide.state, about), tmp_path / "new")
    with pytest.raises(ValueError, match=r"name FILE\.safetensors"):
        exchange.write(weights(vae), tmp_path / "x.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    (tmp_path / "empty.tmp").mkdir()  # anyone's
    (tmp_path / "empty.tmp" / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="the working folder; name a new one"):
        exchange.write(weights(vae), Path("."))
    monkeypatch.chdir(tmp_path)
    exchange.write(weights(vae), tmp_path / "empty")
    exchange.write(weights(vae), tmp_path / "new")
    usual = (tmp_path / "there").stat().st_mode, (tmp_path / "there" / "thesis.tex").stat().st_mode
    left = {"there", "empty", "empty.tmp", "new"}
    assert {p.name for p in tmp_path.iterdir()} == left
    assert (tmp_path / "empty.tmp" / "thesis.tex").exists()
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:  # others may read them
        assert path.stat().st_mode == usual[path.is_file()], path


def test_the_tool_writes_any_layout(
    vae: Path, strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = export_tool()
    exchange.write(weights(vae), tmp_path / "w.pt")
    (tmp_path / "w.pt.json").unlink()
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    told = ["--vae", str(vae), "--image-size", "8", "--num-heads", "3", "--scaling-factor", "0.5"]
    names = ["--class-names", str(tmp_path / "names.txt")]
    folder, back = tmp_path / "pipeline", tmp_path / "back.safetensors"
    tool(["--weights", str(tmp_path / "w.pt"), "--out", str(folder), *told, *names])
    tool(["--weights", str(folder), "--out", str(back), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{folder}: {tmp_path / 'w.pt'}, ")
    assert json.loads(lines[-1])["out"] == str(back)
    described = tmp_path / "described.pt"
    exchange.write(weights(vae), described)
    (tmp_path / "others.txt").write_text("cat\ndog\nape\n")
    other = ["--class-names", str(tmp_path / "others.txt")]
    found = exchange.read(back, NOTHING)
    runs.assert_same_bits(found.state, weights().state)
    assert found.about.class_names == ["cat", "dog", "owl"] and found.about.image_size == 8
    for arguments, sentence in (
        (["--weights", str(back), "--ema-length", "0.1"], "--ema-length needs --run"),
        (["--weights", str(back), "--stock-steps", "5"], "--stock-steps 5 is for diffusers"),
        (["--weights", str(tmp_path / "no")], "no such file or folder"),
        (["--weights", str(back), "--num-heads", "0"], "--num-heads 0 must be"),
        (["--weights", str(back), "--class-names", "no.txt"], "no.txt: cannot be read"),
        (["--weights", str(back), "--num-heads", "4"], f"--num-heads 4 is .* {back} says 3;"),
        (["--weights", str(back), "--image-size", "9"], "--image-size 9 is .* says 8;"),
        (["--weights", str(back), "--scaling-factor", "0.7"], "--scaling-factor 0.7 .* 0.5;"),
        (
            ["--weights", str(back), *other],
            "--class-names .* says .*cat.*; leave --class-names out",
        ),
        (["--weights", str(back), "--vae", "a/b"], "--vae a/b is .*; leave --vae out"),
        (["--weights", str(described), "--num-heads", "4"], "--num-heads 4 is .* says 3;"),
        (["--weights", str(strange), "--num-heads", "4"], "--num-heads 4 is .* says 3;"),
        (["--weights", str(strange), "--scaling-factor", "0.7"], "--scaling-factor 0.7 .* 0.5;"),
        (["--weights", str(strange), "--vae", "a/b"], "--vae a/b is .*folder/vae; leave"),
        (["--weights", str(back), "--scaling-factor", "nan"], "--scaling-factor nan must be"),
    ):
        with pytest.raises(SystemExit) as end:
            tool([*arguments, "--out", str(tmp_path / "x.safetensors")])
        assert end.value.code == 2 and re.search(sentence, capsys.readouterr().err), sentence
    # What is so may be said, and a folder takes another decoder that fits.
    decoder = tmp_path / "decoder"
    shutil.copytree(vae, decoder)
    tool(["--weights", str(back), "--num-heads", "3", "--out", str(tmp_path / "x.pt")])
    assert f"description in {tmp_path / 'x.pt.json'}" in capsys.readouterr().out
    tool(["--weights", str(back), "--vae", str(decoder), "--out", str(tmp_path / "more")])
    assert f"| decoder | `{decoder}`" in (tmp_path / "more" / "README.md").read_text()


def export_tool() -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location("export_tool", REPO / "tools" / "export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], None] = module.main
    return main
