"""A user's mistake in the settings is one sentence: the setting, its value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_ds import config, zero_config
from tests import runs
from tests.conftest import REPO


@pytest.mark.parametrize("path", sorted(config.RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_survives_being_written_down(path: Path, tmp_path: Path) -> None:
    cfg = config.load(path.stem)
    (tmp_path / "config.yaml").write_text(cfg.to_yaml())
    assert config.load(str(tmp_path / "config.yaml")) == cfg


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=3", "unknown key train.stepz (did you mean train.steps?)"),
        ("train.batch=3", "did you mean train.global_batch_size?"),
        ("lr=3", "did you mean optimizer.lr?"),
        ("optimizer.lr=-1", "optimizer.lr=-1: input should be greater than 0"),
        ("optimizer.lr=.nan", "optimizer.lr=nan"),
        ("train.steps=many", "train.steps=many"),
        ("train=3", "train=3"),
        ("train.steps", "expected section.key=value"),
        ("data.lanes=7", "data.lanes=7 does not divide train.global_batch_size=64"),
        (
            "model.name=DiT-B/2",
            "model.name=null for the sizes, or for the name model.patch_size=null",
        ),
        ("model.depth=null", "model.depth is not set"),
        ("zero_optimization.stage=2", "belongs to the DeepSpeed JSON"),
        ("bf16.enabled=true", "belongs to the DeepSpeed JSON"),
        ("train.gradient_accumulation_steps=2", "here it is train.global_batch_size"),
        ("optimizer.warmup_steps=2000", "leaves the cosine no step"),
        ("name=../up", "name=../up"),
        ("train.steps=[", "not valid YAML"),
    ],
)
def test_a_bad_setting_is_named(override: str, sentence: str) -> None:
    with pytest.raises(config.ConfigError) as error:
        config.load("quickstart", [override])
    assert sentence in str(error.value)


def test_an_unknown_recipe_is_told_the_nearest() -> None:
    with pytest.raises(config.ConfigError, match="did you mean quickstart"):
        config.load("quikstart")


@pytest.mark.parametrize("text", ["- a list", "model: [", "", "\x00"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError, match=r"mine\.yaml"):
        config.load(str(path))
    with pytest.raises(config.ConfigError, match=r"absent\.yaml: cannot be read"):
        config.load(str(tmp_path / "absent.yaml"))


def test_overrides_are_yaml() -> None:
    cfg = config.load("quickstart", ["optimizer.lr=2e-4", "optimizer.betas=[0.5, 0.6]", "seed=-3"])
    assert (cfg.optimizer.lr, cfg.optimizer.betas, cfg.seed) == (2e-4, (0.5, 0.6), -3)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"train_batch_size": 8}, "belongs to the recipe; remove it here and set train.global"),
        ({"activation_checkpointing": {}}, "set model.checkpoint_every there"),
        ({"optimizer": {}}, "belongs to the recipe"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
        ({"bf16": {"enabled": True}}, "bf16 at ZeRO stage 0 is refused"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "use stage 1"),
        ([], "expected a JSON object"),
        ({"bf16": True}, "bf16 is a section"),
        ({"zero_optimization": {"stage": "0"}, "bf16": {"enabled": True}}, "stage='0'"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast in float16"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer to nvme",
        ),
    ],
)
def test_a_deepspeed_key_of_another_owner_is_refused(
    tmp_path: Path, tree: object, sentence: str
) -> None:
    path = runs.write_json(tmp_path / "ds.json", tree)  # type: ignore[arg-type]
    with pytest.raises(config.ConfigError) as error:
        zero_config.load(path)
    assert sentence in str(error.value)


def test_deepspeed_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="cannot be read"):
        zero_config.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(config.ConfigError, match="not valid JSON"):
        zero_config.load(tmp_path / "bad.json")


def test_precision_of_the_shipped_files() -> None:
    found = {
        path.stem: zero_config.precision(zero_config.load(path))
        for path in (REPO / "ds_configs").glob("*.json")
    }
    assert found.pop("zero0") == "bfloat16 autocast"
    assert found.pop("zero2_fp16") == found.pop("zeropp") == "fp16"
    assert found.pop("zero2_fp32") == "fp32"
    assert set(found.values()) == {"bf16"}


def test_a_resume_may_change_length_and_topology_only() -> None:
    old = config.load("quickstart")
    config.check_resume(
        old, config.load("quickstart", ["train.steps=9000", "train.micro_batch_size=8"])
    )
    with pytest.raises(config.ConfigError) as error:
        config.check_resume(old, config.load("quickstart", ["optimizer.lr=2e-3", "seed=1"]))
    assert "optimizer.lr=0.002 (was 0.003)" in str(error.value) and "seed=1" in str(error.value)
    assert "--run runs/OTHER_NAME" in str(error.value)
