"""The benchmark on the digits: its trainings, scores and plot; figures are in BENCHMARKS.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dit_ds import benchmark_digits, benchmark_samplers, config, samplers
from dit_ds.benchmark_digits import LR, STEPS, VARIANTS, Training


def tree(training: Training) -> dict[str, Any]:
    recipe, overrides = training.settings(Path("/work"))
    return config.load(recipe, overrides).model_dump()


@pytest.mark.parametrize("name", VARIANTS)
def test_all_see_the_same_images(name: str) -> None:
    found, published = tree(Training(name, 1e-3, 400, 2)), tree(Training("published", 1e-3, 400, 2))
    assert found["data"] == published["data"] and found["seed"] == 2
    train = found["train"]
    assert train == published["train"]
    assert (train["steps"], train["checkpoint_every"], train["keep_checkpoints"]) == (400, 100, 4)
    assert found["optimizer"]["lr"] == 1e-3


def test_optimizers_are_compared_on_the_same_model() -> None:
    ours, theirs = tree(Training("sophiag", LR, 400, 0)), tree(Training("published", LR, 400, 0))
    assert [key for key in ours if ours[key] != theirs[key]] == ["optimizer"]
    assert (
        ours["optimizer"]["betas"]
        == config.load("dit-b-2-256", ["optimizer.name=sophiag"]).optimizer.betas
    )


def test_recipes_are_compared_at_the_learning_rate_they_have() -> None:
    assert {config.load(VARIANTS[name].recipe).optimizer.lr for name in STEPS} == {LR}
    assert STEPS["modern"] * 2 <= STEPS["published"]


def test_what_is_trained_and_scored_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training("published", LR, 8, 0)
    monkeypatch.setattr(benchmark_digits, "prepare", lambda work: None)
    monkeypatch.setattr(
        Training, "command", lambda self, work: ["python", "-c", "import sys; sys.exit('no')"]
    )
    with pytest.raises(ValueError, match=r"published-lr0.003-8-0.log says why"):
        benchmark_digits.train_all(tmp_path, [training])
    assert (tmp_path / "runs" / "published-lr0.003-8-0.log").read_text() == "no\n"
    folder = benchmark_digits.checkpoint(tmp_path, training, 8)
    folder.mkdir(parents=True)  # it is being written
    with pytest.raises(ValueError, match="says why"):
        benchmark_digits.train_all(tmp_path, [training])
    (folder / "index.json").touch()
    benchmark_digits.train_all(tmp_path, [training])
    kept = tmp_path / "scores" / "published-lr0.003-8-0-8-heun-16.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps({"frechet_distance": 0.5}))
    how = benchmark_samplers.settings("heun", 32)
    found = benchmark_digits.score(tmp_path, training, 8, None, how)
    assert found["frechet_distance"] == 0.5


def test_seeds_become_a_mean_and_its_range() -> None:
    scores = [{"frechet_distance": d, "class_accuracy": 0.5} for d in (1.0, 2.0, 6.0)]
    assert benchmark_digits.summary("a", scores) == {
        **{"a": 3.0, "a_from": 1.0, "a_to": 6.0, "a_read": 0.5}
    }


@pytest.mark.parametrize("sampler", [*samplers.OF_DDPM, *samplers.OF_FLOW])
def test_samplers_are_compared_by_calls(sampler: str) -> None:
    for calls in benchmark_samplers.CALLS:
        found = benchmark_samplers.settings(sampler, calls).num_calls
        assert found == calls - (sampler == "heun")


def test_the_plot_shows_each_curve(tmp_path: Path) -> None:
    curves = {"published ddim": [(4, 2.0), (64, 0.2)], "modern heun": [(3, 1.0), (63, 0.1)]}
    benchmark_samplers.draw(curves, tmp_path / "a.png")
    colours = {c for _, c in Image.open(tmp_path / "a.png").getcolors(1 << 20) or []}
    assert (0, 0, 0) in colours and (0, 0x72, 0xB2) in colours
