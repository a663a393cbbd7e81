"""Weights out of and into any of the layouts: which one, its name tells.

FILE.safetensors    ours, with FILE.json
FILE.pt, FILE.pth   the published layout, with FILE.pt.json or without it
FOLDER              a diffusers pipeline; or a run, its newest checkpoint's average
"""

from __future__ import annotations

from pathlib import Path

from dit_ds import diffusers_folder, distributed, export, published
from dit_ds.export import Weights
from dit_ds.layouts import Unsaid


def read(path: Path, unsaid: Unsaid) -> Weights:
    """Weights in any layout, or the average of a run; a collective.

    unsaid: for files that hold tensors alone.

    Raises:
        RankError: there are none, or they are not those of a DiT.
    """
    with distributed.agreed():
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        is_folder, is_pipeline = path.is_dir(), (path / "model_index.json").is_file()
        is_run = (path / "checkpoints").is_dir()
    distributed.agree_on(f"what lies at {path}", [is_folder, is_pipeline, is_run])
    if is_folder and not is_pipeline:
        if not is_run:
            raise distributed.RankError(
                f"{path}: neither a run, which has a folder checkpoints/, nor a pipeline of "
                "diffusers, which has a model_index.json"
            )
        return export.from_run(path)
    with distributed.agreed():
        if is_folder:
            return diffusers_folder.load(path, unsaid)
        if path.suffix in published.SUFFIXES:
            return published.load(path, unsaid)
        return export.load(path)


def write(
    weights: Weights, path: Path, *, vae: str | None = None, num_steps: int | None = None
) -> None:
    """Write weights in the layout that the name asks for; vae, num_steps: for diffusers alone.

    Raises:
        ValueError: that layout cannot express them, or the name tells none.
    """
    is_file = path.suffix in (*published.SUFFIXES, ".safetensors")
    if num_steps is not None and is_file:
        raise ValueError(f"--stock-steps {num_steps} is for diffusers; name a folder as --out")
    if path.suffix in published.SUFFIXES:
        published.save(weights, path)
    elif path.suffix == ".safetensors":
        export.save(weights, path)
    elif not path.suffix or path.is_dir():
        diffusers_folder.save(weights, path, vae=vae, num_steps=num_steps)
    else:
        raise ValueError(
            f"--out {path}: name FILE.safetensors, FILE.pt (published layout), or a folder without "
            "a suffix (diffusers)"
        )


def description_of(path: Path) -> Path | None:
    """The file that describes weights in a file of that name; None for folders."""
    if path.suffix in published.SUFFIXES:
        return published.description_of(path)
    return path.with_suffix(".json") if path.suffix == ".safetensors" else None
