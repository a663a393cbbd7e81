"""`.pt` files in the published DiT's layout: a dictionary of tensors, its description beside it.

Also of public trainers, which keep `{"model": ..., "ema": ..., "opt": ..., "args": ...}`: there the
average is taken. Nothing in the file is run: only tensors and plain values are unpickled.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dit_ds import export, files, layouts
from dit_ds.export import Description, Weights
from dit_ds.layouts import State, Unsaid

SUFFIXES = (".pt", ".pth")


def load(path: Path, unsaid: Unsaid) -> Weights:
    """Read a published file; FILE.json beside it describes it if it is there, else `unsaid` does.

    Half precision becomes float32, which is exact.

    Raises:
        ValueError: no such file, one that holds more than tensors, or not the tensors of a DiT.
    """
    state = tensors(path)
    about = description(path) or layouts.describe(state, unsaid, str(path))
    weights = Weights(state, about)
    layouts.check(weights, str(path))
    return weights


def description(path: Path) -> Description | None:
    """What FILE.json beside such a file says of it; None if there is none."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    try:
        return export.describe(json.loads(beside.read_bytes()), str(beside))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: damaged, or not of tools/export.py ({e!s:.300})") from e


def tensors(path: Path) -> State:
    """The weights in such a file in float32: the average where it has one."""
    try:
        # What the public trainers' files hold beside tensors; it sets attributes and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror or e!s:.200})") from e
    except (RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as e:
        raise ValueError(
            f"{path}: damaged, or it holds more than tensors, which is not loaded since it could "
            f"run code ({str(e).splitlines()[0] if str(e) else type(e).__name__:.200})"
        ) from e
    for key in ("ema", "model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{path}: it holds no dictionary of tensors")
    strange = [k for k, v in tree.items() if not (isinstance(k, str) and _is_plain(v))]
    if strange:
        raise ValueError(f"{path}: {strange[0]!r:.200} is no tensor of numbers")
    return {name.removeprefix("module."): tensor.float() for name, tensor in tree.items()}


def save(weights: Weights, path: Path) -> None:
    """Write FILE.pt and FILE.json, each whole or not at all.

    Raises:
        ValueError: the published model has no such options, or the training was another.
    """
    layouts.check_expressed(weights.about, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().clone() for name, tensor in weights.state.items()}
    with files.atomic_file(path) as file:
        torch.save(state, file)
    files.write_atomically(path.with_suffix(".json"), weights.about.to_json())


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )
