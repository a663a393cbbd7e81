"""A run starts from other weights: which tensors are taken, at every ZeRO stage, and only once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_ds import config, distributed, exchange, export, layouts, warmstart
from dit_ds.export import Description, Sizes, Weights
from dit_ds.models import DIT_MODELS, DiT, initial_value, sincos_pos_embed
from dit_ds.settings import Config, Objective
from tests import runs
from tests.conftest import REPO, run_ranks

TABLE = "y_embedder.embedding_table.weight"
SIZES: dict[str, Any] = dict(
    input_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3,
    mlp_ratio=4.0, learn_sigma=True,
)  # fmt: skip


def describe(names: list[str], objective: Objective | None = None, **changes: Any) -> Description:
    sizes = Sizes.model_validate(SIZES | {"num_classes": len(names)} | changes)
    return Description(
        model=sizes, latent_shape=(4, *sizes.latent_size), scaling_factor=0.5, shift_factor=0.0,
        image_size=min(sizes.latent_size) * 8, class_names=names,
        objective=objective or Objective(), step=7, vae="none", vae_sha256="0" * 64,
        dataset="tests", images_seen=84,
    )  # fmt: skip


def source(names: list[str], **changes: Any) -> Weights:
    """Random weights, those that start as zeros too."""
    about = describe(names, **changes)
    model = DiT(**about.model.model_dump())
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return Weights({k: v.detach() for k, v in model.state_dict().items()}, about)


def fit(given: Weights, target: Description, *, known: bool = True) -> warmstart.Start:
    about = given.about if known else None
    before = {name: tensor.clone() for name, tensor in given.state.items()}
    try:
        return warmstart.fit(given.state, about, target, seed=0, source="x")
    finally:
        runs.assert_same_bits(given.state, before)


def test_the_same_model_is_taken_bit_for_bit() -> None:
    given = source(["a", "b", "c"])
    start = fit(given, describe(["a", "b", "c"]))
    runs.assert_same_bits(start.values, {k: v for k, v in given.state.items() if k != "pos_embed"})
    assert f"{len(start.values)} tensors taken, 0 resized, 0 fresh, no optimizer" in start.told
    assert "weights of step 7" in start.told and "note" not in start.told


def test_weights_that_are_not_numbers_are_refused() -> None:
    given = source(["a", "b", "c"])
    given.state["blocks.1.mlp.fc1.bias"][3] = float("nan")
    with pytest.raises(ValueError, match=r"1 of \d+ tensors hold infinities or NaN.*mlp.fc1.bias"):
        warmstart.fit(given.state, given.about, given.about, seed=0, source="x")
    with pytest.raises(ValueError, match="hold infinities or NaN"):
        given.build()


# For each class of the run: the source's row, or None for a fresh one. The source's null row is 3.
@pytest.mark.parametrize(
    ("here", "known", "rows", "sentence"),
    [
        (["a", "b", "c", "d"], True, [0, 1, 2, None], "3 rows of classes taken, 1 fresh"),
        (["c", "x"], True, [2, None], "left     2 rows of other classes"),
        (["b", "a", "c"], True, [1, 0, 2], "3 rows of classes taken, 0 fresh"),
        (["x", "y", "z"], True, [None] * 3, "0 rows of classes taken, 3 fresh"),
        (["x", "y", "z"], False, [0, 1, 2], "classes go by number"),
        (["0", "1", "2"], True, [0, 1, 2], "classes go by number"),
        (["x", "y"], False, [None, None], "0 rows of classes taken, 2 fresh"),
        (["images"], True, [3], "the one class starts as no class"),
        (["a"], True, [0], "1 rows of classes taken, 0 fresh"),
    ],
)
def test_rows_of_classes(
    here: list[str], known: bool, rows: list[int | None], sentence: str
) -> None:
    given = source(["a", "b", "c"])
    start = fit(given, describe(here), known=known)
    fresh = initial_value(TABLE, (len(here) + 1, 32))
    there = given.state[TABLE]
    wanted = [fresh[i] if row is None else there[row] for i, row in enumerate(rows)]
    assert torch.equal(start.values[TABLE], torch.stack([*wanted, there[3]]))
    assert sentence in start.told


@pytest.mark.parametrize(
    ("here", "rows"),
    [
        (["0", "3", "1"], [0, None, 1]),
        (["1", "2", "9"], [1, 2, None]),
        (["x", "y", "z"], [0, 1, 2]),
    ],
)
def test_names_that_are_numbers_are_names(here: list[str], rows: list[int | None]) -> None:
    given = source(["0", "1", "2"])
    start = fit(given, describe(here))
    fresh, there = initial_value(TABLE, (4, 32)), given.state[TABLE]
    wanted = [fresh[i] if row is None else there[row] for i, row in enumerate(rows)]
    assert torch.equal(start.values[TABLE], torch.stack([*wanted, there[3]]))
    assert ("classes go by number" in start.told) == ("x" in here)


def test_a_run_without_classes_starts_one_with_them() -> None:
    given = source(["images"])
    start = fit(given, describe(["a", "b"]))
    fresh = initial_value(TABLE, (3, 32))
    assert torch.equal(start.values[TABLE], torch.stack([*fresh[:2], given.state[TABLE][1]]))


def test_another_image_size_takes_all_parameters() -> None:
    given = source(["a", "b", "c"])
    start = fit(given, describe(["a", "b", "c"], input_size=(8, 4)))
    assert "pos_embed: recomputed for 4x2 patches (was 2x2)" in start.told
    assert all(torch.equal(start.values[k], given.state[k]) for k in start.values)
    given.state["pos_embed"].mul_(2)  # one that was learned
    with pytest.raises(ValueError, match="not the sine-cosine embedding of 2x2 patches"):
        fit(given, describe(["a", "b", "c"], input_size=8))


@pytest.mark.parametrize("learned", [True, False])
def test_the_variance_may_come_and_go(learned: bool) -> None:
    given = source(["a"], learn_sigma=learned)
    target = describe(["a"], learn_sigma=not learned)
    start = fit(given, target)
    here = DiT(**target.model.model_dump())
    pos_embed = {"pos_embed": given.state["pos_embed"]}
    here.load_state_dict(start.values | pos_embed)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 900]), torch.tensor([0, 1])
    with torch.no_grad():
        ours, theirs = here(x, t, y), given.build()(x, t, y)
    torch.testing.assert_close(ours[:, :4], theirs[:, :4])
    assert learned or not ours[:, 4:].any()
    assert f"variance {'left' if learned else 'fresh'}" in start.told


def test_what_an_option_adds_is_fresh_and_what_differs_is_said() -> None:
    given = source(["a"])
    objective = Objective.model_validate({"prediction": "v"})
    target = describe(["a"], objective, qk_norm=True, rope=True)
    start = fit(given, target)
    assert not [name for name in start.values if "q_norm" in name]
    assert "fresh    blocks.*.attn.q_norm.weight (2)" in start.told
    for note in ("model.rope=True here, False there", "objective.prediction=v here, eps there"):
        assert note in start.told


@pytest.mark.parametrize(
    ("given", "target", "rows"),
    [
        ({}, {"depth": 3}, ["missing     blocks.2.attn.qkv.weight"]),
        ({"depth": 3}, {}, ["unexpected  blocks.2.attn.qkv.weight"]),
        ({"qk_norm": True}, {}, ["unexpected  blocks.0.attn.q_norm.weight", "[16]"]),
        ({}, {"patch_size": 1}, ["misshapen   x_embedder.proj.weight", "[32, 4, 2, 2], expected"]),
        ({}, {"mlp": "swiglu"}, ["misshapen   blocks.1.mlp.fc2.weight", "expected [32, 64]"]),
        ({}, {"hidden_size": 64}, [f"misshapen   {TABLE}", "[2, 32], expected [2, 64]"]),
        ({"depth": 9}, {}, ["unexpected  blocks.2.attn.qkv.weight", "and 30 more"]),
        ({}, {"num_heads": 4}, ["2 heads and model.num_heads=4; set model.num_heads=2"]),
    ],
)
def test_another_model_is_refused_with_all_that_does_not_fit(
    given: dict[str, Any], target: dict[str, Any], rows: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        fit(source(["a"], **given), describe(["a"], **target))
    told = str(error.value)
    assert all(row in told for row in rows), told
    assert len(told.splitlines()) < 50


def test_heads_of_files_of_tensors_alone_are_those_of_the_zoo() -> None:
    assert layouts.num_heads_of(1152, 28) == 16 and layouts.num_heads_of(32, 2) is None


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("described", [True, False])
def test_files_are_read(tmp_path: Path, name: str, described: bool) -> None:
    given = source(["a", "b", "c"])
    exchange.write(given, tmp_path / name)
    if not described:
        beside = "w.json" if name == "w.safetensors" else "w.pt.json"
        (tmp_path / beside).unlink()
    target = describe(["a", "b"]).model_dump(exclude={"step", "images_seen"})
    if not described and name == "w.safetensors":
        with pytest.raises(distributed.RankError, match=r"init.from=.*description w\.json is not"):
            warmstart.read(str(tmp_path / name), target, seed=0)
        return
    start = warmstart.read(str(tmp_path / name), target, seed=0)
    assert f"{2 if described else 0} rows of classes taken" in start.told
    with pytest.raises(distributed.RankError, match=r"^init.from=.*No such file"):
        warmstart.read(str(tmp_path / "none.pt"), target, seed=0)


@pytest.mark.parametrize(
    "claim",
    [
        {"model": {"num_classes": 9}, "class_names": [str(i) for i in range(9)]},
        {"model": {"num_classes": 1}, "class_names": ["c"]},
        {"model": {"input_size": 400_000}, "latent_shape": [4, 400_000, 400_000]},
    ],
    ids=["more classes", "fewer classes", "size"],
)
def test_a_description_is_not_believed(tmp_path: Path, claim: dict[str, Any]) -> None:
    given = source(["a", "b", "c"])
    exchange.write(given, tmp_path / "w.pt")
    tree = given.about.model_dump()
    tree |= claim | {"model": tree["model"] | claim["model"]}
    (tmp_path / "w.pt.json").write_text(json.dumps(tree))
    target = describe(["a", "b"]).model_dump(exclude={"step", "images_seen"})
    with pytest.raises(distributed.RankError, match="the weights do not fit their description"):
        warmstart.read(str(tmp_path / "w.pt"), target, seed=0)


def test_a_position_embedding_is_not_computed_for_what_a_file_claims() -> None:
    given = source(["a", "b", "c"])
    given.state["pos_embed"] = torch.zeros(1).expand(1, 10**12, 1)
    with pytest.raises(ValueError, match="is not the sine-cosine embedding"):
        warmstart.fit(given.state, None, describe(["a", "b", "c"]), seed=0, source="x")


def test_options_of_tensors_alone_are_told_as_the_published_ones() -> None:
    start = fit(source(["a"]), describe(["a"], rope=True, fp32_norms=True), known=False)
    for note in ("model.rope=True here, False there", "model.fp32_norms=True here, False there"):
        assert note in start.told
    assert "model.norm" not in start.told


@pytest.mark.parametrize("change", ["value", "class", "nothing"])
def test_ranks_agree_on_what_they_start_from(change: str) -> None:
    a, b = source(["a", "b", "c"]), source(["a", "b", "c"])
    b.state["pos_embed"] += 1e-7  # as machines may compute it
    about = b.about
    if change == "value":
        b.state["blocks.1.attn.proj.bias"][3] += 1e-3
    elif change == "class":
        about = about.model_copy(update={"class_names": ["b", "a", "c"]})
    digests = {warmstart._digest(a.state, a.about), warmstart._digest(b.state, about)}
    assert len(digests) == (1 if change == "nothing" else 2)


def read_by_rank(folder: str, names: list[str], target: dict[str, Any]) -> str:
    distributed.init()
    with pytest.raises(distributed.RankError) as error:
        # One name, and another thing on each host.
        os.chdir(f"{folder}/{distributed.rank()}")
        warmstart.read(names[0], target, seed=0)
    return str(error.value)


@pytest.mark.parametrize("there", ["run", "weights"])
def test_ranks_that_see_other_sources_stop_together(tmp_path: Path, there: str) -> None:
    target = describe(["a"]).model_dump(exclude={"step", "images_seen"})
    for rank, values in enumerate((0.0, 1.0)):
        given = source(["a"])
        given.state["blocks.0.attn.proj.bias"][0] = values
        exchange.write(given, tmp_path / str(rank) / "w.safetensors")
    if there == "run":
        (tmp_path / "1" / "w.safetensors").unlink()
        (tmp_path / "1" / "w.safetensors").mkdir()
    told = run_ranks(2, read_by_rank, str(tmp_path), ["w.safetensors"], target)
    assert told[0] == told[1] and told[0].startswith("init.from=w.safetensors: the ranks differ in")


def state_after_load(recipe: str, ds_config: str, path: str) -> dict[str, Any]:
    """Weights that the forward pass would take, of a new engine that started from `path`."""
    from dit_ds import zero

    engine, about = runs.engine(recipe, ds_config)
    start = warmstart.read(path, about["weights"], seed=0)
    warmstart.load(engine, start)
    found = {}
    for name, p in engine.module.named_parameters():
        with zero.gathered(p):
            found[name] = p.detach().float().numpy().copy()
    return found


BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


@pytest.mark.parametrize(("stage", "precision"), [(1, {}), (2, BF16), (3, BF16)])
def test_every_stage_computes_with_the_loaded_weights(
    tiny: dict[str, Any], tmp_path: Path, stage: int, precision: dict[str, Any]
) -> None:
    given = source(["a", "b", "c"])
    exchange.write(given, tmp_path / "w.safetensors")
    tree: dict[str, Any] = {"zero_optimization": {"stage": stage}} | precision
    ds = runs.write_json(tmp_path / "ds.json", tree)
    dtype = torch.bfloat16 if precision else torch.float32
    wanted = {k: v.to(dtype).float() for k, v in given.state.items() if k != "pos_embed"}
    path = str(tmp_path / "w.safetensors")
    for found in run_ranks(2, state_after_load, str(tiny["recipe"]), str(ds), path):
        runs.assert_same_bits({k: torch.from_numpy(v) for k, v in found.items()}, wanted)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_starts_from_another_and_goes_on_by_itself(
    tiny: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    given = source(["a", "b", "c"])
    exchange.write(given, tmp_path / "w.pt")
    tree: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if stage == 3:
        tree |= BF16
    ds = runs.write_json(tmp_path / "ds.json", tree)
    # So small a step that float32 weights stay what they were.
    arguments = runs.arguments(tiny, ds, f"init.from={tmp_path / 'w.pt'}", "optimizer.lr=1e-30")
    [told, _] = run_ranks(2, output_of, *arguments, "train.steps=1")
    assert f"starting from {tmp_path / 'w.pt'}" in told and "no optimizer state" in told
    state = runs.state_of(tiny["run"], 1)
    for name, tensor in given.state.items():
        if name != "pos_embed":  # masters and average, to the last bit, in half precision too
            assert torch.equal(state[f"fp32/{name}"], tensor), name
            assert torch.equal(state[f"ema/{name}"], tensor), name
            assert state[f"step/{name}"] == 1
    usual = torch.from_numpy(sincos_pos_embed(32, 2)).unsqueeze(0)
    torch.testing.assert_close(state["module/pos_embed"].float(), usual, rtol=0, atol=4e-3)
    if stage:
        return
    # The source may be gone; another one is refused.
    (tmp_path / "w.pt").unlink()
    [told] = run_ranks(1, output_of, *arguments, "train.steps=2", "optimizer.lr=1e-30")
    assert "starting from" not in told and "resuming at step 1" in told
    [told] = run_ranks(1, runs.train, *arguments, "init.from=other.pt", expect=2)
    assert "other settings: init.from=other.pt (was" in told


def output_of(*arguments: str) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as output:
        runs.train(*arguments)
    return output.getvalue()


def test_a_run_that_cannot_start_makes_no_folder(tiny: dict[str, Any], tmp_path: Path) -> None:
    exchange.write(source(["a"], depth=3), tmp_path / "w.safetensors")
    ds = runs.write_json(tmp_path / "ds.json", {})
    path = tmp_path / "w.safetensors"
    arguments = runs.arguments(tiny, ds, f"init.from={path}")
    [told] = run_ranks(1, runs.train, *arguments, expect=2)
    assert f"init.from={path}: these weights are of another model" in told
    assert "unexpected  blocks.2.attn.qkv.weight" in told and "Traceback" not in told
    assert not tiny["run"].exists()


def test_runs_start_from_runs(tiny: dict[str, Any], tmp_path: Path) -> None:
    ds = runs.write_json(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})
    run_ranks(1, runs.train, *runs.arguments(tiny, ds, "train.steps=3"))
    average = export.from_run(tiny["run"])
    assert average.about.ema_decay == 0.99 and average.about.metrics == {}
    start = warmstart.read(
        str(tiny["run"]), average.about.model_dump(exclude={"step", "images_seen"}), seed=0
    )
    runs.assert_same_bits(start.values | {"pos_embed": average.state["pos_embed"]}, average.state)
    with pytest.raises(distributed.RankError, match="init.from=.*neither a run"):
        warmstart.read(str(tmp_path), average.about.model_dump(), seed=0)


def test_the_setting_is_one_of_the_recipe(tmp_path: Path, tiny: dict[str, Any]) -> None:
    cfg = config.load(str(tiny["recipe"]), ["init.from=runs/a"])
    assert cfg.init.from_ == "runs/a" and "from: runs/a" in cfg.to_yaml()
    (tmp_path / "again.yaml").write_text(cfg.to_yaml())
    assert config.load(str(tmp_path / "again.yaml")) == cfg
    for key in ("init.form", "init.from_"):
        with pytest.raises(config.ConfigError, match=r"did you mean init\.from\?"):
            config.load(str(tiny["recipe"]), [f"{key}=x"])
    with pytest.raises(config.ConfigError, match=r"init\.from=3"):
        config.load(str(tiny["recipe"]), ["init.from=3"])
    old = config.load(str(tiny["recipe"])).model_dump(mode="json")
    old.pop("init")  # of a run made before there was this setting
    assert config.parse(old, "old") == Config.model_validate(old)


def test_the_readme_fine_tunes_the_published_model() -> None:
    text = (REPO / "README.md").read_text()
    [line] = re.findall(r"^launch/train.sh .*init\.from=.*$", text, re.MULTILINE)
    recipe = re.findall(r"--config (\S+)", line)[0]
    cfg = config.load(recipe, [w for w in line.split() if re.match(r"[a-z_.]+=", w)])
    assert cfg.init.from_.endswith("DiT-XL-2-256x256.pt") and cfg.model.name is not None
    sizes = dict(SIZES, **DIT_MODELS[cfg.model.name], input_size=32, num_classes=1000)
    with torch.device("meta"):
        published = DiT(**sizes)
    # As large as the published model's, in no memory.
    given = {k: torch.zeros(1).expand(v.shape) for k, v in published.state_dict().items()}
    given["pos_embed"] = torch.from_numpy(sincos_pos_embed(1152, 16)).unsqueeze(0)
    target = describe([str(i) for i in range(10)], **sizes | {"num_classes": 10})
    start = warmstart.fit(given, None, target, seed=0, source="x")
    assert "(1001, 1152) -> (11, 1152): null row kept, 0 rows of classes taken" in start.told
    assert f"{len(given) - 2} tensors taken, 1 resized, 0 fresh" in start.told
