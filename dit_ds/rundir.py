"""A run is a directory: who holds it, what stands in it, and what may go on in it."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch

from dit_ds import __version__, config, distributed, files, order, zero_config
from dit_ds.archive import Checkpoint, CheckpointError
from dit_ds.manifest import Manifest
from dit_ds.models import DIT_MODELS
from dit_ds.settings import Config, Model


def claim(run: Path) -> IO[bytes] | None:
    """Make the run directory, and hold it for rank 0's process.

    Raises:
        ValueError: another training runs there (perhaps ranks whose launcher was killed), or the
            folder cannot be made.
    """
    if not distributed.is_main():
        return None
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        return files.lock(run / ".lock")
    except ValueError as e:
        raise ValueError(
            f"--run {run}: {e}; end that training first (SIGTERM to its ranks), or choose another "
            "run directory"
        ) from e
    except OSError as e:
        raise ValueError(
            f"--run {run}: {e.filename or run} cannot be written ({e.strerror}); choose another "
            "run directory"
        ) from e


def describe(cfg: Config, ds_config: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint says of itself, as JSON: the run, the data, and how to use its weights."""
    channels, height, width = manifest.latent_shape
    if cfg.data.flip and not manifest.mirrored:
        raise ValueError(
            f"data.flip={cfg.data.flip} asks for mirrored images, and data.path={cfg.data.path}, "
            "made by others, has none; set data.flip=0"
        )
    sizes = cfg.model.model_dump(exclude={"name", "checkpoint_every"})
    if cfg.model.name is not None:
        if cfg.model.name not in DIT_MODELS:
            raise config.unknown("model.name", cfg.model.name, DIT_MODELS)
        sizes |= DIT_MODELS[cfg.model.name]
    model = sizes | {
        "input_size": height if height == width else [height, width],
        "in_channels": channels,
        "num_classes": manifest.num_classes,
    }
    return {
        "config": cfg.model_dump(mode="json"),
        "precision": zero_config.precision(ds_config),
        "dataset": manifest.fingerprint,
        "order": order.VERSION,
        "weights": {
            "model": model,
            "latent_shape": list(manifest.latent_shape),
            "scaling_factor": manifest.scaling_factor,
            "shift_factor": manifest.shift_factor,
            "image_size": manifest.image_size,
            "class_names": list(manifest.class_names),
            "objective": cfg.objective.model_dump(mode="json"),
            "vae": manifest.vae.name,
            "vae_sha256": manifest.vae.sha256,
            "dataset": manifest.fingerprint,
        },
    }


def check_resume(found: Checkpoint | None, cfg: Config, about: dict[str, Any], run: Path) -> None:
    """Refuse to continue a run with other mathematics, precision, data or sizes.

    Raises:
        ValueError: names what changed, and the remedy.
    """
    if found is None:
        written = run / "config.yaml"  # of a run that ended before its first checkpoint
        if written.is_file():
            config.check_resume(config.load(str(written)), cfg)
        return
    old: dict[str, Any] = found.index.about
    weights = old.get("weights")
    if not isinstance(old.get("config"), dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{found.path} was not saved by dit_ds.train; choose another --run")
    try:
        before = config.parse(old["config"], source=str(found.path))
    except config.ConfigError as e:
        raise CheckpointError(f"{e!s:.1000}; use the dit_ds that wrote it, or another --run") from e
    try:
        config.check_resume(before, cfg)
    except config.ConfigError as e:
        raise ValueError(f"{found.path}: {e}") from e
    if old.get("order", 1) != about["order"]:
        raise ValueError(
            f"{found.path} was made by an earlier dit_ds, which took the samples in another order "
            "and with other noise; finish the run with that version, or start another one with "
            "--run runs/OTHER_NAME"
        )
    was, now = old.get("precision"), about["precision"]
    if was != now:
        raise ValueError(
            f"{found.path}: this run was trained in {was!s:.50}, --deepspeed_config asks for "
            f"{now}; use a file with that, or start another run with --run runs/OTHER_NAME"
        )
    if old.get("dataset") != about["dataset"] and not cfg.data.allow_change:
        raise ValueError(
            f"data.path={cfg.data.path} is not the data set that this run was trained on (see "
            f"{found.path}); give the old one, or set data.allow_change=true to go on with this one"
        )
    after, model = about["weights"]["model"], weights.get("model")
    # Options that came later have their defaults in a run that does not know them.
    defaults = {name: field.default for name, field in Model.model_fields.items()}
    then = defaults | model if isinstance(model, dict) else {}
    changed = [
        f"{k}={after[k]} (was {then.get(k)!s:.50})" for k in after if after[k] != then.get(k)
    ]
    if changed:
        raise ValueError(
            f"data.path={cfg.data.path} asks for another model than this run has: "
            f"{', '.join(changed)}; start another run with --run runs/OTHER_NAME"
        )


def write(run: Path, cfg: Config, ds_config: dict[str, Any], *, step: int) -> None:
    """Write what the run is made of into its directory; a collective.

    Raises:
        RankError: it cannot be written, or some rank does not see what rank 0 wrote.
    """
    hosts = distributed.gather_json(f"{platform.node()} {_device_name()}")
    with distributed.agreed():
        if distributed.is_main():
            (run / "done.json").unlink(missing_ok=True)
            files.write_atomically(run / "config.yaml", cfg.to_yaml())
            files.write_atomically(run / "ds_config.json", json.dumps(ds_config, indent=1))
            environment = {
                "dit_ds": __version__,
                "git": _git_commit(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": version("deepspeed"),
                "ranks": hosts,
                "started_at_step": step,
            }
            files.write_atomically(run / "environment.json", json.dumps(environment, indent=1))
    with distributed.agreed():
        deadline = time.monotonic() + 30  # shared file systems lag
        while not (run / "config.yaml").is_file():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--run {run.absolute()} on this host is not the folder that rank 0 writes to; "
                    "put runs on storage that all hosts share"
                )
            time.sleep(0.1)


def finish(run: Path, *, step: int, last_step: int) -> None:
    """Leave `done.json`: a training came to its end in good order, at its last step or as asked.

    The only proof of it, since launchers may end with 0 whatever happened; a collective.
    """
    with distributed.agreed():
        if distributed.is_main():
            ended = datetime.datetime.now(datetime.timezone.utc).isoformat()
            marker = {"step": step, "last_step": last_step, "ended": ended}
            files.write_atomically(run / "done.json", json.dumps(marker))


def _device_name() -> str:
    device = distributed.device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _git_commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
