"""Turn class folders of images into a dataset of VAE latents: shards and a manifest.

    python tools/precompute_latents.py --images DIR --vae PATH_OR_ID --image-size N --out DIR
    deepspeed tools/precompute_latents.py ...   # over all GPUs, with --hostfile over all hosts

Over hosts, DIRs must be the same for all of them. See `dit_ds.extract`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from dit_ds import distributed
from dit_ds.extract import Extraction, extract


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", required=True, metavar="DIR", help="one folder for each class")
    parser.add_argument(
        "--vae", required=True, metavar="PATH_OR_ID", help="diffusers AutoencoderKL: folder, hub id"
    )
    parser.add_argument("--image-size", required=True, type=int, metavar="N", help="side in pixels")
    parser.add_argument("--out", required=True, metavar="DIR", help="for shards and manifest")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="of the encoder")
    parser.add_argument("--samples-per-shard", type=int, default=1024, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    # The deepspeed launcher adds this; we read LOCAL_RANK, which it sets too.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)

    if "WORLD_SIZE" in os.environ:  # started by a launcher
        distributed.init()
    try:
        done = extract(
            args.images,
            args.vae,
            args.image_size,
            args.out,
            batch_size=args.batch_size,
            samples_per_shard=args.samples_per_shard,
        )
    except ValueError as error:
        distributed.exit_with(error)
    except OSError as error:
        distributed.exit_with(ValueError(str(error)))
    if distributed.is_main():
        _report(done, args.out, as_json=args.json)
    distributed.shutdown()


def _report(done: Extraction, out: str, *, as_json: bool) -> None:
    manifest = done.manifest
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    rate = manifest.num_samples / done.seconds
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
    if done.num_skipped:
        print(f"{done.num_skipped} files that are not images were skipped")
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
            "num_skipped": done.num_skipped,
            "seconds": round(done.seconds, 3),
            "images_per_second": round(rate, 3),
            "fingerprint": manifest.fingerprint,
        }
        print(json.dumps(facts))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
