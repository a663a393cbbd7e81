"""Shards that others wrote are read in place, exactly, or refused by tar and key."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import webdataset

from dit_ds import adopt, distributed
from dit_ds.indexed import INDEX_SUFFIX, IndexedReader, index_bytes, open_reader
from dit_ds.loader import Loader, Split
from dit_ds.manifest import Folder, Manifest, ShardError, ShardInfo
from tests.conftest import REPO, make_latents

SHAPE = (4, 6, 6)
VAE = adopt.Vae(0.5, 0.25)
Files = Iterable[tuple[str, bytes]]


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(save: Callable[..., None] = np.savez, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def latent(number: int, dtype: str = "float16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(number).normal(size=shape).astype(dtype)


def write_tar(path: Path, files: Files, format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5
            tar.addfile(member, io.BytesIO(content))


def npy_and_cls(numbers: Iterable[int]) -> Files:
    for i in numbers:
        yield from ((f"{i:05d}.npy", npy(latent(i))), (f"{i:05d}.cls", b"%d" % (i % 3)))


def foreign(folder: Path, counts: tuple[int, ...] = (5, 4)) -> Manifest:
    """A data set of tars that others wrote, adopted."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        write_tar(folder / f"part-{number}.tar", npy_and_cls(range(first, first + count)))
        first += count
    return adopt.index(folder, vae=VAE, image_size=48, values="latents").manifest


def read(folder: Path) -> list[tuple[str, np.ndarray, int]]:
    """(key, values, label) of all samples of a data set."""
    manifest = Manifest.load(folder)
    found = []
    for info in manifest.shards:
        reader = open_reader(Folder(folder), info, manifest)
        for row in range(info.num_samples):
            values = np.frombuffer(reader.image(row, 0), manifest.stored_dtype)
            shaped = values.reshape(manifest.stored_shape)
            found.append((reader.key(row), shaped, reader.label(row)))
    return found


def refusal(folder: Path, **settings: Any) -> str:
    """The message of the refusal to adopt; nothing is left beside the tars."""
    before = sorted(os.listdir(folder))
    usual: dict[str, Any] = {"vae": VAE, "image_size": 48, "values": "latents"}
    with pytest.raises(ValueError) as raised:
        adopt.index(folder, **usual | settings)
    assert sorted(os.listdir(folder)) == before
    return str(raised.value)


KINDS: dict[str, Callable[[np.ndarray, int], dict[str, bytes]]] = {
    "npy and cls": lambda x, y: {"npy": npy(x), "cls": b"%d\n" % y},
    "npy with a longer suffix": lambda x, y: {"latent.npy": npy(x), "cls": b"%d" % y},
    "npy of version 2": lambda x, y: {"npy": _version_2(x), "cls": b"%d" % y},
    "npy with a batch of one": lambda x, y: {"npy": npy(x[None]), "cls": b"%d" % y},
    "npz and json": lambda x, y: {"npz": npz(x=x), "json": json.dumps({"label": y}).encode()},
    "npz with its label": lambda x, y: {"npz": npz(latent=x, y=np.int64(y), text=np.zeros((7, 9)))},
    "safetensors and json": lambda x, y: {
        "safetensors": safetensors.numpy.save({"a": x}),
        "json": json.dumps({"class": str(y), "caption": "a cat"}).encode(),
    },
    "safetensors with its label": lambda x, y: {
        "safetensors": safetensors.numpy.save(
            {"b": x, "label": np.array([y], np.int32)}, {"k": "v"}
        )
    },
}


def _version_2(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(2, 0))
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_as_it_was_written(tmp_path: Path, kind: str, dtype: str) -> None:
    expected = [(f"d/{i:05d}", latent(i, dtype), i * 2 % 7) for i in range(7)]
    for number, part in enumerate((expected[:4], expected[4:])):
        with webdataset.TarWriter(str(tmp_path / f"x-{number}.tar"), encoder=False) as tar:
            for key, x, y in part:
                tar.write({"__key__": key, "txt": b"a word", **KINDS[kind](x, y)})
    done = adopt.index(tmp_path, vae=VAE, image_size=48, values="latents", workers=2)
    manifest = Manifest.load(tmp_path)
    assert manifest == done.manifest and done.ignored[".txt"] == 7
    assert manifest.latent_shape == SHAPE and manifest.num_samples == 7
    assert manifest.class_names == tuple("0123456")
    for (key, x, y), (found_key, found, label) in zip(expected, read(tmp_path), strict=True):
        assert (found_key, label) == (key, y)
        assert found.dtype == x.dtype and np.array_equal(found, x)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_of_any_length_in_any_tar(tmp_path: Path, format: int) -> None:
    keys = ["k", "f/" + "k" * 90, "g" * 60 + "/" + "k" * 60]
    if format != tarfile.USTAR_FORMAT:
        keys.append("./" + "o" * 300)
    files = [(f"{key}.{s}", c) for key in keys for s, c in (("npy", npy(latent(0))), ("cls", b"1"))]
    write_tar(tmp_path / "x.tar", files, format)
    adopt.index(tmp_path, vae=VAE, image_size=48, values="latents")
    assert [key for key, _, _ in read(tmp_path)] == keys


def test_labels_may_be_names_and_may_lack_altogether(tmp_path: Path) -> None:
    named, plain = tmp_path / "named", tmp_path / "plain"
    named.mkdir()
    plain.mkdir()
    tree = b'{"label": "cat"}'
    write_tar(named / "x.tar", [("a.npy", npy(latent(0))), ("a.json", tree)])
    assert "label 'cat' in its json, which is no class; write a class number" in refusal(named)
    adopt.index(named, vae=VAE, image_size=48, values="latents", class_names=["dog", "cat"])
    assert [label for _, _, label in read(named)] == [1]
    assert Manifest.load(named).class_names == ("dog", "cat")
    write_tar(plain / "x.tar", [("a.npy", npy(latent(0))), ("b.npy", npy(latent(1)))])
    assert "2 class names, but sample a has no label" in refusal(plain, class_names=["a", "b"])
    adopt.index(plain, vae=VAE, image_size=48, values="latents")
    assert Manifest.load(plain).num_classes == 1


@pytest.mark.parametrize("values", ["moments", "latents", "scaled_latents"])
def test_statistics_are_those_of_the_unscaled_latents(tmp_path: Path, values: str) -> None:
    shape = (8, 6, 6) if values == "moments" else SHAPE
    data = [latent(i, "float32", shape) + np.arange(shape[0])[:, None, None] / 9 for i in range(9)]
    data = [x.astype(np.float32) for x in data]
    for part in range(3):
        files = [(f"{i}.npy", npy(data[i])) for i in range(part, 9, 3)]
        write_tar(tmp_path / f"{part}.tar", files)
    found = adopt.index(tmp_path, vae=VAE, image_size=48, values=values).manifest.statistics  # type: ignore[arg-type]
    x = np.stack(data).astype(np.float64)
    extra = np.exp(x[:, 4:]).mean((0, 2, 3)) if values == "moments" else 0.0
    x = x[:, :4] / 0.5 + 0.25 if values == "scaled_latents" else x[:, :4]
    assert found is not None
    np.testing.assert_allclose(found.mean, x.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(found.std, np.sqrt(x.var((0, 2, 3)) + extra), rtol=1e-10)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


BAD = np.full(SHAPE, np.nan, np.float16)
BF16 = safetensors.torch.save({"a": torch.zeros(SHAPE, dtype=torch.bfloat16)})
SAMPLES: dict[str, tuple[dict[str, bytes], str]] = {
    "compressed": ({"npz": npz(np.savez_compressed, a=latent(0))}, "write it with np.savez"),
    "bfloat16": ({"safetensors": BF16}, "is BF16 of shape .*write it as one of these"),
    "big-endian": ({"npy": npy(latent(0, ">f4"))}, "is >f4 of shape"),
    "double": ({"npy": npy(latent(0, "float64"))}, "is <f8 of shape"),
    "Fortran": ({"npy": npy(np.asfortranarray(latent(0)))}, "Fortran order; save np.ascontig"),
    "pickle": ({"npy": npy(np.array([_Bomb()], object))}, "pickled Python objects"),
    "pickle in npz": ({"npz": npz(a=np.array([_Bomb()], object))}, "pickled Python objects"),
    "torch": ({"pth": pickle.dumps(1)}, "not one npy, npz or safetensors member but only pth"),
    "two members": ({"npy": npy(latent(0)), "npz": npz(a=latent(0))}, "member but npy, npz"),
    "two arrays": ({"npz": npz(a=latent(0), b=latent(1))}, r"not one array .* but a <f2 .*, b <f2"),
    "flat": ({"npy": npy(np.zeros(144, np.float16))}, r"not one array of shape .C, h, w. but <f2"),
    "other shape": ({"npy": npy(latent(0, shape=(4, 3, 12)))}, r"of shape \(4, 3, 12\), the first"),
    "other type": ({"npy": npy(latent(0, "float32"))}, "is float32 of shape .* first .* float16"),
    "nan": ({"npy": npy(BAD)}, "values that are not finite"),
    "cut npy": ({"npy": npy(latent(0))[:-2]}, "has 286 bytes of values, not 288"),
    "no npy": ({"npy": b"hello"}, "is not a sound npy file"),
    "no npz": ({"npz": npz(a=latent(0))[:-9]}, "is not a sound npz file"),
    "altered npz": (
        {"npz": npz(a=latent(0)).replace(latent(0).tobytes()[:8], b"\0" * 8)},
        "array a is damaged, its CRC differs",
    ),
    "cut safetensors": (
        {"safetensors": safetensors.numpy.save({"a": latent(0)})[:-8]},
        "not a sound safetensors file .tensor a lies outside",
    ),
    "bad label": ({"npy": npy(latent(0)), "cls": b"cat"}, "has the label 'cat' in its cls"),
    "negative label": (
        {"npy": npy(latent(0)), "json": b'{"label": -1}'},
        "has the label -1, not one of 0-999999",
    ),
    "true label": ({"npy": npy(latent(0)), "json": b'{"label": true}'}, "has the label True"),
    "bad json": ({"npy": npy(latent(0)), "json": b"{"}, "has a json that cannot be read"),
    "no label": ({"npy": npy(latent(0)), "cls": b""}, "has the label '' in its cls"),
    "long label": ({"npy": npy(latent(0)), "cls": b"9" * 5000}, "has the label '9+[.]+9+' in its"),
    "long number": (
        {"npy": npy(latent(0)), "json": b'{"label": %s}' % (b"9" * 5000)},
        "has a json that cannot be read",
    ),
    "large array label": ({"npz": npz(a=latent(0), y=np.uint64(2**64 - 1))}, "label 18446.*, not"),
    "array label": (
        {"npz": npz(a=latent(0), y=np.float32(1))},
        "is <f4 of shape .., not one integ",
    ),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_what_cannot_be_read_in_place_is_named(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a pickle that ran would leave a folder
    members, message = SAMPLES[kind]
    data = tmp_path / "data"
    data.mkdir()
    if not {"cls", "json"} & set(members) and "array label" not in kind:
        members = {**members, "cls": b"0"}
    bad = [(f"bad.{suffix}", content) for suffix, content in members.items()]
    write_tar(data / "x-0.tar", npy_and_cls(range(3)))
    write_tar(data / "x-1.tar", [*npy_and_cls([3]), *bad, *npy_and_cls([4])])
    pattern = rf"(?s)data: 1 faults; no manifest was written:\nx-1.tar: sample bad .*{message}"
    with pytest.raises(ValueError, match=pattern):
        adopt.index(data, vae=VAE, image_size=48, values="latents")
    assert sorted(os.listdir(tmp_path)) == ["data"]
    assert sorted(os.listdir(data)) == ["x-0.tar", "x-1.tar"]


def test_a_label_that_some_samples_lack(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [*npy_and_cls([0]), ("b.npy", npy(latent(1)))])
    assert "x.tar: sample b has no label, the first sample of all has one" in refusal(tmp_path)


def test_all_faults_of_all_tars_are_counted(tmp_path: Path) -> None:
    for number in range(3):
        bad = [(f"{i}.npy", npy(BAD)) for i in range(8)]
        write_tar(tmp_path / f"x-{number}.tar", [("a.npy", npy(latent(0))), *bad])
    message = refusal(tmp_path)
    assert "24 faults" in message and message.endswith("... and 14 more")
    assert "x-0.tar: sample 7" in message and "x-1.tar: sample 1 " in message


def test_cut_damaged_and_packed_tars_are_named(tmp_path: Path) -> None:
    def damaged(change: Callable[[bytes], bytes]) -> str:
        write_tar(tmp_path / "x-0.tar", npy_and_cls(range(3)))
        write_tar(tmp_path / "x-1.tar", npy_and_cls(range(3, 6)))
        path = tmp_path / "x-1.tar"
        path.write_bytes(change(path.read_bytes()))
        return refusal(tmp_path)

    # A sample takes 512 + 512 bytes of npy and 512 + 512 of cls here.
    assert len(npy(latent(0))) <= 512
    assert "x-1.tar: has no end-of-archive blocks at byte 4096" in damaged(lambda b: b[:4096])
    assert "end-of-archive blocks at byte 6144" in damaged(lambda b: b[: 6144 + 512])
    assert "x-1.tar: is no sound uncompressed tar (" in damaged(lambda b: b[: 4096 + 700])
    assert "x-1.tar: goes on with other bytes at byte 4096" in damaged(
        lambda b: b[:4100] + b"?" + b[4101:]
    )
    assert "x-1.tar: goes on with other bytes" in damaged(lambda b: b + b)
    assert "x-1.tar: cannot be read" in damaged(lambda b: b"")
    assert "x-1.tar: is no sound uncompressed tar" in damaged(lambda b: b"\x1f\x8b" + b)
    assert "x-1.tar: holds no samples" in damaged(lambda b: bytes(10240))
    twice = [*npy_and_cls([3, 4, 3])]
    write_tar(tmp_path / "x-1.tar", twice)
    assert "x-1.tar: 00003.npy is there twice; keep one" in refusal(tmp_path)
    write_tar(tmp_path / "x-1.tar", npy_and_cls(range(3)))
    assert "x-1.tar: has the same content as x-0.tar" in refusal(tmp_path)
    (tmp_path / "x-1.tar").rename(tmp_path / "x 1.tar")
    assert "x 1.tar: names are of letters" in refusal(tmp_path)
    (tmp_path / "x 1.tar").rename(tmp_path / "x-1.tar.gz")
    assert "1 tars are compressed (first: x-1.tar.gz)" in refusal(tmp_path)


def test_links_in_a_tar_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", npy_and_cls(range(2)))
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        link = tarfile.TarInfo("b.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert "x.tar: b.npy is a link or sparse" in refusal(tmp_path)


def test_what_the_values_are_is_settled_or_asked_for(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.npy", npy(latent(0, shape=(8, 6, 6))))])
    first = adopt.first_sample(tmp_path)
    known = adopt.Vae(0.5, channels=4)
    assert adopt.settle(first, None, known) == "moments"
    assert adopt.settle(first, "scaled_latents", VAE) == "scaled_latents"
    for values, channels, message in (
        (None, None, r"latents or moments of 4 channels; give one: moments, .* deviation"),
        (None, 8, "latents; give one"),
        ("latents", 4, "values=latents: .* 4 channels; these are moments"),
        ("moments", 8, "values=moments: .* these are latents or scaled_latents"),
        ("latents", 16, "16 channels, did not make"),
    ):
        with pytest.raises(ValueError, match=message):
            adopt.settle(first, values, adopt.Vae(0.5, channels=channels))  # type: ignore[arg-type]
    assert "image_size=50 does not fit" in refusal(tmp_path, image_size=50)
    assert "scaling_factor=0.0 is not a positive" in refusal(tmp_path, vae=adopt.Vae(0.0))
    assert "workers=0 is not at least 1" in refusal(tmp_path, workers=0)


def test_a_folder_without_tars_and_one_with_a_manifest_are_refused(tmp_path: Path) -> None:
    assert "no *.tar lies there" in refusal(tmp_path)
    make_latents(tmp_path, counts=(3,))
    assert "manifest.json exists: this is a data set already" in refusal(tmp_path)
    (tmp_path / "manifest.json").unlink()  # our own shards hold two images a sample
    assert "sample 000000000 has not one array of shape (C, h, w)" in refusal(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        adopt.first_sample(tmp_path / "nowhere")


def test_the_fingerprint_is_of_tars_and_indices(tmp_path: Path) -> None:
    first = foreign(tmp_path)
    (tmp_path / "manifest.json").unlink()
    again = adopt.index(tmp_path, vae=VAE, image_size=48, values="latents", workers=1).manifest
    assert again == first
    (tmp_path / "manifest.json").unlink()
    other = adopt.index(tmp_path, vae=VAE, image_size=48, values="scaled_latents").manifest
    assert other.fingerprint != first.fingerprint


def test_reading_names_damage_to_tar_and_index(tmp_path: Path) -> None:
    manifest = foreign(tmp_path, counts=(5,))
    info = manifest.shards[0]
    tar, index = tmp_path / info.name, tmp_path / (info.name + INDEX_SUFFIX)
    whole, rows = tar.read_bytes(), index.read_bytes()

    def error(info: ShardInfo = info) -> str:
        with pytest.raises(ShardError) as raised:
            open_reader(Folder(tmp_path), info, manifest).label(0)
        tar.write_bytes(whole), index.write_bytes(rows)
        return str(raised.value)

    tar.write_bytes(whole[:-1])
    assert f"part-0.tar: has {len(whole) - 1} bytes, not" in error()
    tar.write_bytes(whole[:800] + b"\0" + whole[801:])
    assert "part-0.tar: its content was altered: sha256" in error()
    index.write_bytes(rows[:-1] + b"\1")
    assert "part-0.tar: its index part-0.tar.index.npy was altered" in error()
    index.unlink()
    assert "part-0.tar.index.npy: cannot be read" in error()

    def replaced(content: bytes) -> str:
        """With an index that has the right checksum all the same."""
        index.write_bytes(content)
        return error(info.model_copy(update={"index_sha256": hashlib.sha256(content).hexdigest()}))

    good = open_reader(Folder(tmp_path), info, manifest)
    assert isinstance(good, IndexedReader)
    for row, column, value, message in (
        (1, 2, 3, "sample 00001 has the label 3, not one of 0-2"),
        (4, 1, len(whole) - 287, "points out of the shard"),
        (4, 1, 2**63 - 10, "points out of the shard"),
        (0, 0, -512, "points out of the shard"),
        (2, 0, 4096 + 3000, "points out of the shard"),
    ):
        table = good.rows.copy()
        table[row, column] = value
        assert message in replaced(index_bytes(table))
    assert "is <i8 of shape (4, 3), not <i8 of (5, 3)" in replaced(index_bytes(good.rows[:4]))
    for content, message in (
        (npy(good.rows.astype(np.float64)), "is <f8 of shape (5, 3), not <i8"),
        (npy(np.array([_Bomb()], object)), "holds pickled Python objects"),
        (npz(rows=good.rows), "is not a sound npy file"),
        (b"", "is not a sound npy file"),
        (rows[:-8], "has 112 bytes of values, not 120"),
    ):
        assert f"part-0.tar: its index {index.name} {message}" in replaced(content)


def test_a_manifest_whose_shards_do_not_fit_its_layout_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path, counts=(2, 2))
    path = tmp_path / "manifest.json"
    whole = json.loads(path.read_text())
    without: dict[str, Any] = json.loads(path.read_text())
    del without["shards"][1]["index_sha256"]
    del whole["layout"]
    for changed, message in (
        (without, "shard part-1.tar has no index_sha256, which a layout asks for"),
        (whole, "shard part-0.tar has an index_sha256, but the manifest no layout"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"manifest.json: .*{message}"):
            Manifest.load(tmp_path)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _swap(path: Path) -> None:
    other = path.with_name(path.name.replace("part-1", "part-0"))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [_flip, _cut, _swap, _blank, Path.unlink])
@pytest.mark.parametrize("name", ["part-1.tar", "part-1.tar" + INDEX_SUFFIX])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_names_whatever_happens_to_shards_of_others(
    tmp_path: Path, damage: Callable[[Path], None], name: str, workers: int
) -> None:
    manifest = foreign(tmp_path, counts=(7, 7, 7))
    damage(tmp_path / name)
    split = Split.of(global_batch=6, world_size=1, micro_batch=3)
    how = {"lanes": 2, "window": 2, "seed": 3, "first_step": 0, "last_step": 3}
    with (
        pytest.raises(distributed.RankError, match=r"part-[01]\.tar.*: .*; copy it again"),
        Loader(Folder(tmp_path), manifest, split, flip=0.0, workers=workers, **how) as loader,
    ):
        for _ in range(3):
            loader.next()


class _Copies(Folder):
    """A store whose first copies are damaged, as those in a cache may be."""

    def discard(self, name: str, sha256: str) -> bool:
        spare = self.path / "spare" / name
        if not spare.exists():
            return False
        os.replace(spare, self.path / name)
        return True


@pytest.mark.parametrize("name", ["part-0.tar", "part-0.tar" + INDEX_SUFFIX])
@pytest.mark.parametrize("cut", [False, True])
def test_another_copy_is_asked_for_once(tmp_path: Path, name: str, cut: bool) -> None:
    manifest = foreign(tmp_path, counts=(3,))
    path, spare = tmp_path / name, tmp_path / "spare" / name
    good = path.read_bytes()
    spare.parent.mkdir()
    spare.write_bytes(good)
    path.write_bytes(good[:-7] if cut else good[:-7] + b"changed")
    reader = open_reader(_Copies(tmp_path), manifest.shards[0], manifest)
    assert [reader.label(row) for row in range(3)] == [0, 1, 2]
    path.write_bytes(good[:-7])
    reader = open_reader(_Copies(tmp_path), manifest.shards[0], manifest)
    with pytest.raises(ShardError):
        reader.label(0)


def test_a_reader_survives_close_and_pickling(tmp_path: Path) -> None:
    manifest = foreign(tmp_path, counts=(3,))
    reader = open_reader(Folder(tmp_path), manifest.shards[0], manifest)
    assert reader.label(2) == 2
    data = pickle.dumps(reader)
    assert len(data) < 3000  # without the data
    reader.close()
    for other in (reader, pickle.loads(data)):
        assert np.array_equal(np.frombuffer(other.image(1, 0), "<f2").reshape(SHAPE), latent(1))
        assert other.key(1) == "00001"


def test_a_killed_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", npy_and_cls(range(2)))
    monkeypatch.setattr(adopt, "_sums", lambda *_: os.kill(os.getpid(), 9))
    assert "a worker process was killed" in refusal(tmp_path)


def test_indexing_does_not_import_torch() -> None:
    modules = "dit_ds.adopt, dit_ds.split, dit_ds.verify"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
