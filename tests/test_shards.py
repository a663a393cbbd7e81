"""The format on disk: others can read it, we read it back exactly, and every damage is named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ds.manifest import Folder, Manifest, ShardError, ShardInfo, VaeInfo, check_files
from dit_ds.shards import ShardReader, ShardWriter


def write(folder: Path, *, num: int = 7, shards: int = 2, latent=(4, 6, 5), moments=None):
    """A dataset of random moments: (manifest, all moments (num * shards, 2, 2C, h, w))."""
    folder.mkdir(exist_ok=True)
    channels, high, wide = latent
    if moments is None:
        shape = (num * shards, 2, 2 * channels, high, wide)
        moments = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    infos = []
    for number in range(shards):
        with ShardWriter(folder / f"latents-{number:06d}.tar") as shard:
            for i in range(number * num, (number + 1) * num):
                shard.add(f"{i:09d}", moments[i], i % 12)
        infos.append(shard.info)
    manifest = Manifest(
        created_by="test",
        class_names=tuple(f"class {i}" for i in range(12)),
        image_size=48,
        latent_shape=latent,
        scaling_factor=0.5,
        vae=VaeInfo(name="somewhere", sha256="0" * 64),
        shards=tuple(infos),
    )
    manifest.save(folder)
    return manifest, moments


def read_all(folder: Path, manifest: Manifest) -> None:
    for info in manifest.shards:
        reader = ShardReader(Folder(folder), info, manifest)
        reader.moments(np.arange(info.num_samples), np.zeros(info.num_samples, bool))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num=st.integers(1, 9), channels=st.integers(1, 5), side=st.integers(1, 6))
def test_any_rows_are_read_back_exactly(tmp_path_factory, data, num, channels, side) -> None:
    folder = tmp_path_factory.mktemp("shards")
    manifest, moments = write(folder, num=num, shards=1, latent=(channels, side, side + 1))
    rows = np.array(data.draw(st.lists(st.integers(0, num - 1), max_size=12)), np.int64)
    flips = np.array([data.draw(st.booleans()) for _ in rows], bool)
    reader = ShardReader(Folder(folder), manifest.shards[0], manifest)
    found = reader.moments(rows, flips)
    assert found.dtype == np.float16 and np.array_equal(found, moments[rows, flips.astype(int)])
    assert [reader.label(row) for row in rows] == [row % 12 for row in rows]
    assert [reader.key(row) for row in rows] == [f"{row:09d}" for row in rows]


def test_webdataset_and_tarfile_read_the_shards(tmp_path: Path) -> None:
    manifest, moments = write(tmp_path)
    paths = [str(tmp_path / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(14)]
    assert [s["cls"] for s in samples] == [i % 12 for i in range(14)]
    for sample, expected in zip(samples, moments, strict=True):
        assert np.array_equal(sample["moments.npy"], expected)
    with tarfile.open(paths[0], "r:") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar.getmembers()} == {(0, 0, 0, "")}


def test_equal_samples_make_equal_bytes(tmp_path: Path) -> None:
    a, _ = write(tmp_path / "a")
    b, _ = write(tmp_path / "b")
    assert a.shards == b.shards


def test_a_full_disk_names_the_shard_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # what a write meets on a full disk
    try:
        with pytest.raises(OSError, match="x.tar"), ShardWriter(tmp_path / "x.tar") as shard:
            for i in range(20):
                shard.add(str(i), np.zeros((2, 8, 8, 8), np.float16), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_manifest_round_trip_and_fingerprint(tmp_path: Path) -> None:
    manifest, _ = write(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert (manifest.num_samples, manifest.num_classes) == (14, 12)

    def changed(**values) -> str:
        return Manifest(**{**dict(manifest), **values}).fingerprint

    renamed = VaeInfo(name="elsewhere", sha256=manifest.vae.sha256)
    assert changed(vae=renamed, created_by="another version") == manifest.fingerprint
    for values in (
        {"shards": manifest.shards[::-1]},
        {"scaling_factor": 0.6},
        {"shift_factor": 0.1},
        {"class_names": manifest.class_names[::-1]},
        {"vae": VaeInfo(name="somewhere", sha256="1" * 64)},
    ):
        assert changed(**values) != manifest.fingerprint, values


def test_a_missing_or_foreign_manifest_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest.json: cannot be read.*precompute_latents.py"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: not a manifest.*precompute_latents.py"):
        Manifest.load(tmp_path)
    manifest, _ = write(tmp_path)
    content = json.loads(manifest.model_dump_json())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(ValueError, match="of this version: format_version"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/b.tar", "..", ""])
def test_a_shard_lies_in_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        ShardInfo(name=name, num_samples=1, num_bytes=1, sha256="0" * 64)


def test_missing_and_cut_shards_are_found_at_the_start(tmp_path: Path) -> None:
    manifest, _ = write(tmp_path, shards=3)
    check_files(tmp_path, manifest)
    (tmp_path / "latents-000000.tar").unlink()
    os.truncate(tmp_path / "latents-000002.tar", 1000)
    with pytest.raises(ShardError, match="2 of 3 shards .*0.tar is missing; .*2.tar has 1000 byt"):
        check_files(tmp_path, manifest)
    with pytest.raises(ShardError, match=r"nowhere: cannot be read"):
        check_files(tmp_path / "nowhere", manifest)


def test_reading_names_a_missing_a_cut_and_an_altered_shard(tmp_path: Path) -> None:
    manifest, _ = write(tmp_path, shards=1)
    path = tmp_path / "latents-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    with pytest.raises(
        ShardError, match=rf"0.tar: has {len(whole) - 512} bytes, not.*{len(whole)}"
    ):
        read_all(tmp_path, manifest)
    for position in (0, 700, len(whole) - 1100):  # a header, moments, a label
        altered = bytearray(whole)
        altered[position] ^= 1
        path.write_bytes(altered)
        with pytest.raises(ShardError, match="0.tar: its content was altered.*copy it again"):
            read_all(tmp_path, manifest)
    path.unlink()
    with pytest.raises(ShardError, match="0.tar: cannot be read .No such file"):
        read_all(tmp_path, manifest)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_shard_and_key(tmp_path: Path, value: float) -> None:
    moments = np.zeros((14, 2, 8, 3, 3), np.float16)
    moments[3] = np.finfo(np.float16).min  # finite
    moments[9, 1, 7, 2, 2] = value
    manifest, _ = write(tmp_path, latent=(4, 3, 3), moments=moments)
    with pytest.raises(ShardError, match="latents-000001.tar: sample 000000009 .* not finite"):
        read_all(tmp_path, manifest)


def test_a_shard_that_does_not_fit_its_manifest_is_named(tmp_path: Path) -> None:
    manifest, _ = write(tmp_path, latent=(4, 2, 8))

    def read_as(**values) -> None:
        read_all(tmp_path, Manifest(**{**dict(manifest), **values}))

    with pytest.raises(ShardError, match="0.tar: .* bytes cannot hold 7 samples"):
        read_as(latent_shape=(16, 6, 5))
    with pytest.raises(ShardError, match="sample 000000000 is not float16 moments of shape"):
        read_as(latent_shape=(4, 4, 4))  # as many values
    with pytest.raises(ShardError, match="sample 000000003 has the label b'3', not one of 0-2"):
        read_as(class_names=("a", "b", "c"))


def test_a_tar_of_another_order_is_named(tmp_path: Path) -> None:
    manifest, _ = write(tmp_path, num=2, shards=1)
    path = tmp_path / "latents-000000.tar"
    data = path.read_bytes().replace(b"000000001.cls", b"000000002.cls")
    path.write_bytes(data)
    info = manifest.shards[0].model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(ShardError, match="sample 1 is not KEY.moments.npy followed by KEY.cls"):
        ShardReader(Folder(tmp_path), info, manifest).label(0)


def test_each_shard_is_checked_once(tmp_path: Path) -> None:
    manifest, moments = write(tmp_path, shards=1)
    reader = ShardReader(Folder(tmp_path), manifest.shards[0], manifest)
    row, flip = np.array([2]), np.array([1])
    reader.label(2)
    path = tmp_path / "latents-000000.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader.close()
    assert np.array_equal(reader.moments(row, flip), moments[row, flip])


_inherited: list[ShardReader] = []


def _inherit(reader: ShardReader) -> None:
    _inherited.append(reader)


def _read_in_child() -> np.ndarray:
    return _inherited[-1].moments(np.array([5, 1]), np.array([True, False]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_reader_survives_fork_and_pickling(tmp_path: Path, method: str, opened: bool) -> None:
    manifest, moments = write(tmp_path, shards=1)
    reader = ShardReader(Folder(tmp_path), manifest.shards[0], manifest)
    if opened:
        reader.label(0)
        assert len(pickle.dumps(reader)) < 5000  # without the data
    # As DataLoader does: `fork` hands over the reader as it is, `spawn` pickles it.
    with multiprocessing.get_context(method).Pool(1, _inherit, (reader,)) as pool:
        found = pool.apply(_read_in_child)
    assert np.array_equal(found, moments[[5, 1], [1, 0]])
