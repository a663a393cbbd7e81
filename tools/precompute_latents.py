"""Turn images into a dataset of VAE latents: shards and a manifest.

    python tools/precompute_latents.py --images SOURCE --vae PATH_OR_ID --image-size N --out DIR
    deepspeed tools/precompute_latents.py ...   # over all GPUs, with --hostfile over all hosts

SOURCE is a folder with one folder for each class (or only images: no classes), a text file of
`path<TAB>class` lines (or only paths), or tars of images as webdataset knows them: a path, a glob
pattern, a brace pattern like shards/{0000..0099}.tar, or a URL. The same command goes on with what
was interrupted. Over hosts, SOURCE and DIR must be the same for all of them. See `dit_ds.extract`.
"""

from __future__ import annotations

import argparse
import json
import sys

from dit_ds import distributed
from dit_ds.extract import extract
from dit_ds.manifest import Manifest
from dit_ds.records import Extraction


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, metavar="SOURCE", help="folder, list or tars")
    parser.add_argument(
        "--vae", required=True, metavar="PATH_OR_ID", help="diffusers AutoencoderKL: folder, hub id"
    )
    parser.add_argument("--image-size", required=True, type=int, metavar="N", help="side in pixels")
    parser.add_argument("--out", required=True, metavar="DIR", help="for shards and manifest")
    parser.add_argument(
        "--classes", metavar="FILE", help="class names, one on each line, for labels in tars"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="of the encoder; found by itself if not given"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default fp32")
    parser.add_argument("--threads", type=int, metavar="N", help="of each rank on CPUs")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode, each rank")
    parser.add_argument("--samples-per-shard", type=int, metavar="N", help="default 1024")
    parser.add_argument(
        "--max-rejected", type=float, default=0.01, metavar="SHARE", help="of bad images; then stop"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    # The deepspeed launcher adds this; we read LOCAL_RANK, which it sets too.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)

    if distributed.launched():
        distributed.init()
    try:
        done = extract(
            args.images,
            args.vae,
            args.image_size,
            args.out,
            classes=args.classes,
            batch_size=args.batch_size,
            precision=args.precision,
            threads=args.threads,
            samples_per_shard=args.samples_per_shard,
            workers=args.workers,
            max_rejected=args.max_rejected,
        )
    except ValueError as error:
        distributed.exit_with(error)
    except OSError as error:
        distributed.exit_with(ValueError(str(error)))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on\n")
    if distributed.is_main():
        if done is None:
            _report_finished(args.out, as_json=args.json)
        else:
            _report(done, args.out, as_json=args.json)
    distributed.shutdown()


def _report_finished(out: str, *, as_json: bool) -> None:
    manifest = Manifest.load(out)
    print(f"{out}: is finished already, {manifest.num_samples} images; nothing was done")
    if as_json:
        facts = {"num_samples": manifest.num_samples, "fingerprint": manifest.fingerprint}
        print(json.dumps({"out": out, **facts}))


def _report(done: Extraction, out: str, *, as_json: bool) -> None:
    manifest = done.manifest
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    rate = done.num_encoded / done.encoding_seconds
    channels, high, wide = manifest.latent_shape
    print(
        f"{out}: {manifest.num_samples} images in {manifest.num_classes} classes, latents "
        f"{channels}x{high}x{wide}, {len(manifest.shards)} shards, {num_bytes / 1e6:.1f} MB, "
        f"{done.seconds:.1f} s, {rate:.1f} images/s"
    )
    if done.num_enlarged:
        print(f"{done.num_enlarged} images were smaller than {manifest.image_size} and enlarged")
    for mode, num in done.num_converted.items():
        print(f"{num} images were converted from {mode} to RGB")
    if done.num_animated:
        print(f"{done.num_animated} images have several frames; the first was taken")
    if done.num_skipped:
        print(f"{done.num_skipped} files that are not images were skipped")
    if done.num_rejected:
        print(f"{done.num_rejected} images were rejected, see {out}/rejected.jsonl:")
        print(done.rejected)
    if done.empty_classes:
        names, more = done.empty_classes[:5], ", ..." if len(done.empty_classes) > 5 else ""
        print(
            f"warning: {len(done.empty_classes)} of {manifest.num_classes} classes have no image: "
            f"{', '.join(names)}{more}"
        )
    statistics = manifest.statistics
    assert statistics is not None
    for name, values in (("mean", statistics.mean), ("std", statistics.std)):
        print(f"latents' {name} by channel: {' '.join(f'{value:.3f}' for value in values)}")
    if not 0.5 <= done.scaled_std <= 2:
        print(
            f"warning: scaled by {manifest.scaling_factor:g}, the latents' standard deviation is "
            f"{done.scaled_std:.3g}, far from 1; is it the wrong VAE or scaling factor? See "
            f"{out}/preview.png"
        )
    if as_json:
        facts = {
            "out": out,
            "num_samples": manifest.num_samples,
            "num_classes": manifest.num_classes,
            "num_shards": len(manifest.shards),
            "num_bytes": num_bytes,
            "latent_shape": manifest.latent_shape,
            "num_enlarged": done.num_enlarged,
            "num_converted": done.num_converted,
            "num_animated": done.num_animated,
            "num_skipped": done.num_skipped,
            "num_rejected": done.num_rejected,
            "num_empty_classes": len(done.empty_classes),
            "statistics": statistics.model_dump(),
            "scaled_std": round(done.scaled_std, 6),
            "seconds": round(done.seconds, 3),
            "images_per_second": round(rate, 3),
            "fingerprint": manifest.fingerprint,
        }
        print(json.dumps(facts))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
