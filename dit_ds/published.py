"""`.pt` files in the published DiT's layout: a dictionary of tensors, its description beside it.

Also of public trainers, which keep `{"model": ..., "ema": ..., "opt": ..., "args": ...}`: there the
average is taken. Nothing in the file is run: only tensors, plain values and `argparse.Namespace`
are unpickled. The description of FILE.pt is FILE.pt.json: FILE.json is that of a FILE.safetensors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dit_ds import export, files, layouts
from dit_ds.export import Description, Weights
from dit_ds.layouts import State, Unsaid

SUFFIXES = (".pt", ".pth")


def load(path: Path, unsaid: Unsaid) -> Weights:
    """Read a published file; FILE.pt.json describes it if it is there, else `unsaid` does.

    Half precision becomes float32, which is exact.

    Raises:
        ValueError: no such file, one that holds more than tensors, or not the tensors of a DiT.
    """
    state, about = read(path)
    if about is None:
        about = layouts.describe(state, unsaid, str(path))
        Weights(state, about).check(str(path))
    return Weights(state, about)


def read(path: Path) -> tuple[State, Description | None]:
    """The tensors, and the description that they fit; None if there is none.

    Raises:
        ValueError: as `load`.
    """
    state, about = tensors(path), None
    beside = description_of(path)
    if beside.is_file():
        try:
            about = export.describe(json.loads(beside.read_bytes()), str(beside))
        except (OSError, ValueError, RecursionError) as e:
            raise ValueError(f"{path}: damaged, or not of tools/export.py ({e!s:.300})") from e
        Weights(state, about).check(str(path))
    return state, about


def description_of(path: Path) -> Path:
    """FILE.pt.json of FILE.pt."""
    return path.with_name(f"{path.name}.json")


def tensors(path: Path) -> State:
    """The weights in such a file in float32: the average where it has one."""
    try:
        # What the public trainers' files hold beside tensors; it sets attributes and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror or e!s:.200})") from e
    except Exception as e:  # damaged files raise whatever torch's readers run into
        raise ValueError(
            f"{path}: damaged, or it holds more than tensors, which is not loaded since it could "
            f"run code ({type(e).__name__}); give a file of a state dict"
        ) from e
    for key in ("ema", "model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
            break
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{path}: it holds no dictionary of tensors")
    return plain(tree, path)


def plain(tree: Mapping[Any, Any], path: Path) -> State:
    """The tensors of a stranger's file in float32, without the names' `module.`.

    Raises:
        ValueError: something is no tensor of numbers, is larger than what the file holds of it (a
            few bytes can claim any shape), or is float64, which float32 would round.
    """
    for name, value in tree.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ValueError(f"{path}: {name!r:.200} is no tensor of numbers")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {name!r:.200} claims {list(value.shape)}, and the file does not hold so "
                "many values; save it with .contiguous()"
            )
        if value.dtype == torch.float64:
            raise ValueError(f"{path}: {name!r:.200} is float64; save it in float32")
    return {name.removeprefix("module."): tensor.detach().float() for name, tensor in tree.items()}


def save(weights: Weights, path: Path) -> None:
    """Write FILE.pt and FILE.pt.json, each whole or not at all.

    Raises:
        ValueError: the published model has no such options, or the training was another.
    """
    layouts.check_expressed(weights.about, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().clone() for name, tensor in weights.state.items()}
    with files.atomic_file(path) as file:
        torch.save(state, file)
    files.write_atomically(description_of(path), weights.about.to_json())


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.numel() > 0
        and value.device.type == "cpu"
    )
