"""Look after data sets of latents: verify them, show them, adopt those of others, split them.

    python tools/shards.py verify DIR_OR_URL
    python tools/shards.py show DIR_OR_URL
    python tools/shards.py index DIR --vae PATH_OR_ID
    python tools/shards.py split DIR --validation 0.01

See `dit_ds.verify`, `dit_ds.adopt` and `dit_ds.split`. Exits with 1 if `verify` finds faults, with
2 on mistakes, with 130 on Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_ds import adopt, remote
from dit_ds.indexed import open_reader
from dit_ds.labels import read_class_names
from dit_ds.manifest import Folder, Manifest, Store, VaeInfo
from dit_ds.split import VALIDATION, split
from dit_ds.verify import verify

Facts = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on the last line")
    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument("--workers", type=int, metavar="N", help="processes (one per core)")

    check = commands.add_parser("verify", parents=[common, workers], help="name every fault")
    check.add_argument("data", metavar="DIR_OR_URL")
    show = commands.add_parser("show", parents=[common], help="a summary")
    show.add_argument("data", metavar="DIR_OR_URL")
    show.add_argument("--classes", action="store_true", help="samples of each class; reads shards")

    index = commands.add_parser(
        "index", parents=[common, workers], help="make the manifest for tars that others wrote"
    )
    index.add_argument("data", metavar="DIR")
    index.add_argument("--values", choices=["moments", "latents", "scaled_latents"])
    index.add_argument("--vae", metavar="PATH_OR_ID", help="tells scale, shift and image size")
    index.add_argument("--scaling-factor", type=float, metavar="F", help="instead of the VAE's")
    index.add_argument("--shift-factor", type=float, metavar="F", help="instead of the VAE's; or 0")
    index.add_argument(
        "--image-size", type=int, metavar="N", help="shorter side in pixels, without --vae"
    )
    index.add_argument("--classes", metavar="FILE", help="class names, one on each line")

    cut = commands.add_parser("split", parents=[common], help="carve out DIR/validation")
    cut.add_argument("data", metavar="DIR")
    cut.add_argument("--validation", type=float, required=True, metavar="SHARE", help="as 0.01")

    args = parser.parse_args(arguments)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us in silence, as it does others
    command = {"verify": _verify, "show": _show, "index": _index, "split": _split}[args.command]
    try:
        facts = command(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    if args.json:
        print(json.dumps(facts))
    if facts.get("faults"):
        parser.exit(1)


@contextmanager
def _store(path: str) -> Iterator[Store]:
    """The store at a path. What comes from a URL is fetched anew and kept no longer than needed."""
    if not remote.is_url(path):
        yield Folder(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = remote.Cache(Path(folder), max_bytes=1)
        largest = max(shard.num_bytes for shard in remote.Remote(path, cache).manifest().shards)
        num_at_once = 2 * (os.cpu_count() or 1)
        yield remote.Remote(path, remote.Cache(Path(folder), max_bytes=num_at_once * largest))


def _verify(args: argparse.Namespace) -> Facts:
    began = time.monotonic()
    with _store(args.data) as store:
        verdict = verify(store, workers=args.workers)
    facts = _about(verdict.manifest)
    seconds = time.monotonic() - began
    for note in verdict.notes:
        print(f"note: {note}")
    for fault in verdict.faults:
        print(f"FAULT: {fault}")
    print(
        f"{args.data}: {len(verdict.faults)} faults in {facts['num_samples']} samples, "
        f"{facts['num_shards']} shards, {facts['num_bytes'] / 1e6:.1f} MB, {seconds:.1f} s"
    )
    found = {"faults": verdict.faults, "notes": verdict.notes, "seconds": round(seconds, 3)}
    return {"data": args.data, **facts, **found}


def _show(args: argparse.Namespace) -> Facts:
    with _store(args.data) as store:
        manifest = store.manifest()
        counts = _count_classes(store, manifest) if args.classes else None
    return {"data": args.data, **_tell(manifest, counts)}


def _index(args: argparse.Namespace) -> Facts:
    names = None
    if args.classes:
        names = read_class_names(args.classes)
    if args.vae:
        if args.image_size:
            raise ValueError(f"--image-size {args.image_size}: with --vae it follows from the data")
        from dit_ds import latents  # imports torch, which the other commands need not wait for

        model = latents.load_vae(args.vae)
        space = latents.LatentSpace.from_vae(model)
        side = min(adopt.first_sample(args.data, names).shape[1:])
        image_size = side * latents.vae_factor(model)
        vae = adopt.Vae(
            space.scaling_factor if args.scaling_factor is None else args.scaling_factor,
            space.shift_factor if args.shift_factor is None else args.shift_factor,
            model.config.latent_channels,
            VaeInfo(name=latents.vae_name(args.vae), sha256=latents.vae_hash(model)),
        )
    elif args.scaling_factor is None or args.image_size is None:
        raise ValueError(
            "the tars do not say how the model is to see their latents; give --vae, or "
            "--scaling-factor, --image-size and, if it is not 0, --shift-factor"
        )
    else:
        image_size, vae = args.image_size, adopt.Vae(args.scaling_factor, args.shift_factor or 0.0)
    done = adopt.index(
        args.data,
        vae=vae,
        image_size=image_size,
        values=args.values,
        class_names=names,
        workers=args.workers,
    )
    facts = _tell(done.manifest, None)
    for kind, num in done.ignored.items():
        print(f"{num} {kind} are not read")
    statistics = done.manifest.statistics
    assert statistics is not None and done.manifest.layout is not None
    std = vae.scaling_factor * sum(statistics.std) / len(statistics.std)
    if not 0.5 < std < 2:
        print(
            f"WARNING: the model would see latents of standard deviation {std:.3g}, not about 1; "
            "is it the right VAE or scaling factor, and are these "
            f"{done.manifest.layout.values}?"
        )
    return {"data": args.data, **facts, "ignored": done.ignored}


def _split(args: argparse.Namespace) -> Facts:
    training, validation = split(args.data, args.validation)
    place = os.path.join(args.data, VALIDATION)
    seen = len(_count_classes(Folder(place), validation))
    print(
        f"{args.data}: {training.num_samples} samples for training; {place}: "
        f"{validation.num_samples} for validation, of {seen} of {validation.num_classes} classes\n"
        f"the training set is another now (fingerprint {training.fingerprint[:12]}): runs that "
        "began on the whole will not resume on it"
    )
    return {"training": _about(training), "validation": {**_about(validation), "data": place}}


def _about(manifest: Manifest) -> Facts:
    return {
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "num_bytes": sum(shard.num_bytes for shard in manifest.shards),
        "num_classes": manifest.num_classes,
        "image_size": manifest.image_size,
        "latent_shape": manifest.latent_shape,
        "scaling_factor": manifest.scaling_factor,
        "shift_factor": manifest.shift_factor,
        "vae": manifest.vae.name,
        "vae_sha256": manifest.vae.sha256,
        "layout": manifest.layout.model_dump() if manifest.layout else None,
        "statistics": manifest.statistics.model_dump() if manifest.statistics else None,
        "fingerprint": manifest.fingerprint,
    }


def _tell(manifest: Manifest, counts: Counter[int] | None) -> Facts:
    """Print a summary; the facts in it."""
    facts = _about(manifest)
    names = manifest.class_names
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    layout = manifest.layout
    kind = f"{layout.values}, {layout.dtype}, by others" if layout else "moments, both orientations"
    print(
        f"samples      {facts['num_samples']} in {facts['num_shards']} shards, "
        f"{facts['num_bytes'] / 1e6:.1f} MB\n"
        f"classes      {len(names)}: {shown}\n"
        f"images       {'x'.join(map(str, manifest.image_shape))}\n"
        f"latents      {'x'.join(map(str, manifest.latent_shape))} ({kind})\n"
        f"scale        {manifest.scaling_factor:g}, shift {manifest.shift_factor:g}\n"
        f"VAE          {manifest.vae.name} ({manifest.vae.sha256[:12]})"
    )
    if manifest.statistics:
        print(f"mean         {'  '.join(f'{x:.4g}' for x in manifest.statistics.mean)}")
        print(f"deviation    {'  '.join(f'{x:.4g}' for x in manifest.statistics.std)}")
    print(f"made by      {manifest.created_by}\nfingerprint  {facts['fingerprint']}")
    if counts is not None:
        for number, name in enumerate(names):
            print(f"{counts[number]:12d} {name}")
        facts["class_counts"] = [counts[number] for number in range(len(names))]
    return facts


def _count_classes(store: Store, manifest: Manifest) -> Counter[int]:
    """The number of samples of each class that has any. Does not verify the shards."""
    counts: Counter[int] = Counter()
    for info in manifest.shards:
        reader = open_reader(store, info, manifest, checked=True)
        counts.update(reader.label(row) for row in range(info.num_samples))
    return counts


if __name__ == "__main__":
    main()
