"""The words after `dit_ds.train`, as the ranks and their supervisor read them. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dit_ds import config
from dit_ds.settings import Config

DEEPSPEED_CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero2.json"


def parser() -> argparse.ArgumentParser:
    """Of a rank of a training."""
    found = argparse.ArgumentParser(
        prog="dit_ds.train", description="Train a diffusion transformer with DeepSpeed."
    )
    found.add_argument("--config", required=True, help="a recipe's name, or a YAML file")
    found.add_argument("--run", type=Path, help="run directory (default: runs/NAME)")
    found.add_argument(
        "--deepspeed_config", type=Path, default=DEEPSPEED_CONFIG, help="default: %(default)s"
    )
    found.add_argument(
        "--strict",
        action="store_true",
        help="refuse to go on from an earlier checkpoint where the newest is damaged",
    )
    found.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    found.add_argument("overrides", nargs="*", metavar="section.key=value")
    return found


def run_directory(args: argparse.Namespace, cfg: Config) -> Path:
    """Where the run of these words is."""
    return args.run or Path("runs") / cfg.name


def training(words: Sequence[str]) -> tuple[Path, Config]:
    """Run directory and settings of a command line.

    Raises:
        ConfigError: of the recipe or an override.
    """
    args = parser().parse_intermixed_args(words)
    cfg = config.load(args.config, args.overrides)
    return run_directory(args, cfg), cfg
