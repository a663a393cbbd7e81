"""Everything that is wrong with a data set: `tools/shards.py verify`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dit_ds import parallel
from dit_ds.indexed import INDEX_SUFFIX, open_reader
from dit_ds.manifest import Folder, Manifest, ShardInfo, Store


@dataclass(frozen=True)
class Verdict:
    """What was found. faults: the data set is damaged; notes: worth a look. A sentence each."""

    manifest: Manifest
    faults: list[str]
    notes: list[str]


def verify(store: Store, *, workers: int | None = None) -> Verdict:
    """Read all of a data set and name every fault: files, checksums, labels, keys, values.

    workers: processes; default: one per core.

    Raises:
        ValueError: there is no manifest.
    """
    manifest = store.manifest()
    # Each process gets its shard alone: the whole manifest may be large.
    jobs = [(store, manifest.model_copy(update={"shards": (s,)})) for s in manifest.shards]
    sizes = [shard.num_bytes for shard in manifest.shards]
    faults, hashes = _listed_twice(manifest.shards), []
    for found, keys in parallel.each(_check, jobs, sizes=sizes, workers=workers):
        faults += found
        hashes.append(keys)
    notes = _unnamed(store.path, manifest) if isinstance(store, Folder) else []
    within, across = _repeated_keys(store, manifest, hashes)
    faults += within
    # Others may number the samples of each shard anew; our keys are numbers in the whole listing.
    if manifest.layout is None:
        faults += across
    else:
        notes += across
    return Verdict(manifest, faults, notes)


def _check(job: tuple[Store, Manifest]) -> tuple[list[str], np.ndarray]:
    """The faults of a shard, and the hashes of its keys (n,) uint64, none if it is damaged."""
    store, manifest = job
    reader = open_reader(store, manifest.shards[0], manifest, checked=True)
    faults = list(reader.faults())
    if faults:
        return faults, np.empty(0, np.uint64)
    try:
        keys = [reader.key(row) for row in range(manifest.num_samples)]
    except ValueError as error:
        return [str(error)], np.empty(0, np.uint64)
    digests = [hashlib.blake2b(os.fsencode(key), digest_size=8).digest() for key in keys]
    return [], np.frombuffer(b"".join(digests), np.uint64)


def _listed_twice(shards: Sequence[ShardInfo]) -> list[str]:
    """Shards that the manifest names twice, by name or by content."""
    faults = []
    names: set[str] = set()
    contents: dict[tuple[str, str | None], str] = {}
    for shard in shards:
        # A shard of others may be shared by two indices, as `split` does.
        other = contents.setdefault((shard.sha256, shard.index_sha256), shard.name)
        if shard.name in names:
            faults.append(f"{shard.name}: the manifest names it twice")
        elif other != shard.name:
            faults.append(f"{shard.name}: is to have the same content as {other}")
        names.add(shard.name)
    return faults


def _repeated_keys(
    store: Store, manifest: Manifest, hashes: Sequence[np.ndarray]
) -> tuple[list[str], list[str]]:
    """Keys that two samples have, within a shard and across shards: a sentence for each pair."""
    all_hashes = np.concatenate(hashes)
    shards = np.repeat(np.arange(len(hashes)), [len(h) for h in hashes])
    starts = np.cumsum([0] + [len(h) for h in hashes])
    order = np.argsort(all_hashes, kind="stable")
    again = np.flatnonzero(all_hashes[order][1:] == all_hashes[order][:-1])
    pairs: dict[tuple[int, int], list[int]] = {}
    for first, second in zip(order[again].tolist(), order[again + 1].tolist(), strict=True):
        pairs.setdefault((int(shards[first]), int(shards[second])), []).append(first)
    within, across = [], []
    for (a, b), samples in sorted(pairs.items()):
        reader = open_reader(store, manifest.shards[a], manifest, checked=True)
        key = reader.key(samples[0] - int(starts[a]))
        more = f" and {len(samples) - 1} more keys" if len(samples) > 1 else ""
        where = store.where(manifest.shards[a].name)
        if a == b:
            within.append(f"{where}: key {key}{more} twice")
        else:
            across.append(f"{where}: key {key}{more} also in {manifest.shards[b].name}")
    return within, across


def _unnamed(folder: os.PathLike[str], manifest: Manifest) -> list[str]:
    """Files that look like data or leftovers, and that the manifest does not name."""
    named = {shard.name for shard in manifest.shards}
    named |= {shard.name + INDEX_SUFFIX for shard in manifest.shards if shard.index_sha256}
    return [f"{os.path.join(folder, name)}: not in the manifest" for name in _data(folder, named)]


def _data(folder: os.PathLike[str], named: set[str]) -> Iterator[str]:
    for name in sorted(os.listdir(folder)):
        if name not in named and name.endswith((".tar", INDEX_SUFFIX, ".tmp")):
            yield name
