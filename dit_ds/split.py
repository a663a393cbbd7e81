"""A validation set carved out of a data set: `tools/shards.py split`.

All that is new is made in `DIR/validation.tmp`: the validation set, and in a folder `training` the
new training manifest with what it needs. Renaming that to `DIR/validation` decides: before, nothing
has changed; after, the same command moves `training` into place and finishes, however often it is
killed. Samples are linked, never moved, and names are removed last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit_ds import files
from dit_ds.files import atomic_file, atomic_path, sync
from dit_ds.indexed import INDEX_SUFFIX, IndexedReader, index_bytes, open_reader
from dit_ds.manifest import MANIFEST_NAME, Folder, Manifest, ShardInfo
from dit_ds.remote import is_url
from dit_ds.shards import ShardReader, ShardWriter

VALIDATION = "validation"
_STAGE, _TRAINING = "validation.tmp", "training"
_WHOLE = "whole.json"  # the old manifest, by which is known what the new one has no use for
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS)


def split(directory: str | Path, share: float) -> tuple[Manifest, Manifest]:
    """Make `DIR/validation` of round(share * N) samples, at least 1; the training set loses them.

    Whole shards are taken in the order of their checksums, which is as good as drawn, and the last
    one is cut in two by a hash of the keys. So the split depends on the data alone, and the same
    command again changes nothing. Both sets keep the statistics of the whole: they are estimates,
    and the two are to be scaled alike. Of tars that others wrote none is removed or rewritten; a
    cut one gets two links with an index each.

    Returns:
        The manifests for training and validation.

    Raises:
        ValueError: a share that leaves one of them empty, a damaged shard, or a data set that is
            split already by another share.
    """
    if is_url(str(directory)):
        raise ValueError(f"{directory} is a URL; split a copy in a local folder, then upload it")
    directory = Path(directory)
    if not 0 < share < 1:
        raise ValueError(f"validation={share} is not between 0 and 1; give a share, as 0.01")
    Manifest.load(directory)  # before a lock is left in a folder that is none of ours
    with files.lock(directory / ".split.lock"):
        place = directory / VALIDATION
        if (place / _TRAINING).exists():  # a split that was killed
            _finish(directory)
        if (place / MANIFEST_NAME).exists():
            training, validation = Manifest.load(directory), Manifest.load(place)
            _check_same(share, training, validation, place)
            return training, validation
        if place.exists():
            raise ValueError(f"{place} is in the way and no validation set; move it elsewhere")
        whole = Manifest.load(directory)
        _stage(directory, whole, _num_wanted(share, whole.num_samples))
        os.replace(directory / _STAGE, place)
        sync(directory)
        _finish(directory)
        return Manifest.load(directory), Manifest.load(place)


def _num_wanted(share: float, total: int) -> int:
    num = max(1, round(share * total))
    if num >= total:
        raise ValueError(
            f"validation={share}: {num} of {total} samples leave none for training; give less"
        )
    return num


def _check_same(share: float, training: Manifest, validation: Manifest, place: Path) -> None:
    """Refuse to split again by another share."""
    num = validation.num_samples
    if num != _num_wanted(share, training.num_samples + num):
        raise ValueError(
            f"validation={share}: the data set is split already, {place} holds {num} samples; use "
            "it as it is, or make the data set again"
        )


def _stage(directory: Path, whole: Manifest, num_wanted: int) -> None:
    """Make all that is new. Nothing that was there is touched."""
    stage = directory / _STAGE
    if stage.exists():  # of a split that was killed
        shutil.rmtree(stage)
    (stage / _TRAINING).mkdir(parents=True)
    chosen = _choose(whole.shards, num_wanted)
    training, validation = [], []
    for shard in whole.shards:
        num = chosen.get(shard.name, 0)
        if num == 0:
            training.append(shard)
            continue
        if num == shard.num_samples:
            _link(directory / shard.name, stage / shard.name)
            if shard.index_sha256:
                _link(directory / (shard.name + INDEX_SUFFIX), stage / (shard.name + INDEX_SUFFIX))
            validation.append(shard)
        else:
            rest, part = _cut(directory, whole, shard, num)
            training.append(rest)
            validation.append(part)
    files.write_atomically(stage / _TRAINING / _WHOLE, whole.model_dump_json())
    whole.model_copy(update={"shards": tuple(validation)}).save(stage)
    whole.model_copy(update={"shards": tuple(training)}).save(stage / _TRAINING)


def _choose(shards: Sequence[ShardInfo], num_wanted: int) -> dict[str, int]:
    """How many samples of which shards, by name: all of them, but for the last."""
    chosen: dict[str, int] = {}
    for shard in sorted(shards, key=lambda s: (s.sha256, s.name)):
        if num_wanted == 0:
            break
        chosen[shard.name] = min(num_wanted, shard.num_samples)
        num_wanted -= chosen[shard.name]
    return chosen


def _cut(
    directory: Path, whole: Manifest, shard: ShardInfo, num: int
) -> tuple[ShardInfo, ShardInfo]:
    """Stage a shard in two parts: the rest for training, and `num` samples for validation."""
    stem = shard.name.removesuffix(".tar")
    rest = directory / _STAGE / _TRAINING / f"{stem}-train.tar"
    part = directory / _STAGE / f"{stem}-validation.tar"
    _check_free(directory / rest.name)
    _check_free(directory / (rest.name + INDEX_SUFFIX))
    reader = open_reader(Folder(directory), shard, whole)
    rows = range(shard.num_samples)
    hashes = [hashlib.sha256(os.fsencode(reader.key(row))).digest() for row in rows]
    taken = set(sorted(rows, key=hashes.__getitem__)[:num])
    write = _write_index if isinstance(reader, IndexedReader) else _write_shard
    return (
        write(directory, whole, shard, rest, [row for row in rows if row not in taken]),
        write(directory, whole, shard, part, sorted(taken)),
    )


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise ValueError(f"{path} is in the way of the new training set; move it away")


def _write_shard(
    directory: Path, whole: Manifest, shard: ShardInfo, path: Path, rows: Sequence[int]
) -> ShardInfo:
    """Some rows of one of our shards as a shard."""
    reader = ShardReader(Folder(directory), shard, whole, checked=True)
    with ShardWriter(path) as writer:
        for row in rows:
            both = [np.frombuffer(reader.image(row, flip), "<f2") for flip in (0, 1)]
            moments = np.stack(both).reshape(2, *whole.moments_shape)
            writer.add(reader.key(row), moments, reader.label(row))
    return writer.info


def _write_index(
    directory: Path, whole: Manifest, shard: ShardInfo, path: Path, rows: Sequence[int]
) -> ShardInfo:
    """Some rows of a shard of others: a link to the tar with an index of its own."""
    reader = IndexedReader(Folder(directory), shard, whole, checked=True)
    content = index_bytes(reader.rows[list(rows)])
    _link(directory / shard.name, path)
    with atomic_file(path.with_name(path.name + INDEX_SUFFIX)) as file:
        file.write(content)
    new = {"name": path.name, "num_samples": len(rows)}
    return shard.model_copy(update=new | {"index_sha256": hashlib.sha256(content).hexdigest()})


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    source = source.resolve()  # a link to a symbolic link would not hold in another folder
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def _finish(directory: Path) -> None:
    """Put what was staged for training into place, then remove the names that are left over."""
    staged = directory / VALIDATION / _TRAINING
    manifest, whole = staged / MANIFEST_NAME, staged / _WHOLE
    for path in staged.iterdir():
        if path not in (manifest, whole):
            _check_free(directory / path.name)
            os.replace(path, directory / path.name)
    sync(directory)
    if manifest.exists():
        os.replace(manifest, directory / MANIFEST_NAME)
        sync(directory)
    if whole.exists():
        _remove_superseded(directory, Manifest.parse(whole.read_bytes(), str(whole)))
        whole.unlink()
    staged.rmdir()
    sync(directory)


def _remove_superseded(directory: Path, whole: Manifest) -> None:
    """Remove the shards that are left over, known by name and content: the set may be others'."""
    kept = {shard.name for shard in Manifest.load(directory).shards}
    for shard in whole.shards:
        if shard.name in kept:
            continue
        name, sha256 = shard.name, shard.sha256
        if shard.index_sha256:  # the tars of others are theirs; our index of one goes
            name, sha256 = name + INDEX_SUFFIX, shard.index_sha256
        path = directory / name
        if path.is_file() and files.sha256(path) == sha256:
            path.unlink()
