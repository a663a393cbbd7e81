"""A validation set is carved out exactly, by the data alone, and no kill loses a sample."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_ds import adopt
from dit_ds.files import lock
from dit_ds.indexed import INDEX_SUFFIX, open_reader
from dit_ds.manifest import Folder, Manifest
from dit_ds.split import split
from dit_ds.verify import verify
from tests.conftest import make_latents
from tests.test_indexed import VAE, foreign, latent, npy, write_tar

Samples = dict[str, tuple[bytes, int]]


def ours(folder: Path, counts: tuple[int, ...]) -> Manifest:
    return make_latents(folder, counts, channels=1, size=2)


MAKERS: dict[str, Callable[[Path, tuple[int, ...]], Manifest]] = {"ours": ours, "others": foreign}


def samples(folder: Path) -> Samples:
    """All that a data set holds, by key: values of all orientations, and label."""
    manifest = Manifest.load(folder)
    found: Samples = {}
    for info in manifest.shards:
        reader = open_reader(Folder(folder), info, manifest)
        for row in range(info.num_samples):
            flips = range(2 if manifest.mirrored else 1)
            values = b"".join(bytes(reader.image(row, flip)) for flip in flips)
            assert reader.key(row) not in found
            found[reader.key(row)] = (values, reader.label(row))
    return found


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("maker", MAKERS)
@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=5).filter(lambda c: sum(c) > 1),
    share=st.floats(0.001, 0.6),
)
def test_the_share_is_exact_and_the_samples_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, maker: str, counts: list[int], share: float
) -> None:
    folder = tmp_path_factory.mktemp("data")
    whole = MAKERS[maker](folder, tuple(counts))
    before = samples(folder)
    num = max(1, round(share * sum(counts)))
    if num == sum(counts):
        with pytest.raises(ValueError, match=f"{num} of {num} samples leave none for training"):
            split(folder, share)
        return
    training, validation = split(folder, share)
    assert validation.num_samples == num and training.num_samples == sum(counts) - num
    a, b = samples(folder), samples(folder / "validation")
    assert not a.keys() & b.keys() and a | b == before
    for manifest, place in ((training, folder), (validation, folder / "validation")):
        assert manifest == Manifest.load(place)
        assert verify(Folder(place), workers=1).faults == []
        same = {"shards": (), "statistics": None}
        assert manifest.model_copy(update=same) == whole.model_copy(update=same)
        assert manifest.statistics == whole.statistics
    assert training.fingerprint != whole.fingerprint != validation.fingerprint
    assert names(folder / "validation") == _named(validation)
    others = {s.name for s in whole.shards} if maker == "others" else set()  # are theirs
    left = {*_named(training), "validation", ".split.lock"}
    assert others <= set(names(folder)) == left | others


def _named(manifest: Manifest) -> list[str]:
    files = [shard.name for shard in manifest.shards]
    files += [shard.name + INDEX_SUFFIX for shard in manifest.shards if shard.index_sha256]
    return sorted([*files, "manifest.json"])


def test_keys_that_are_no_unicode(tmp_path: Path) -> None:
    files = [(f"caf\udce9-{i}.npy", npy(latent(i))) for i in range(4)]  # one byte, as of Latin-1
    write_tar(tmp_path / "x.tar", files)
    adopt.index(tmp_path, vae=VAE, image_size=48, values="latents")
    before = samples(tmp_path)
    split(tmp_path, 0.5)
    assert samples(tmp_path) | samples(tmp_path / "validation") == before
    assert verify(Folder(tmp_path), workers=1).faults == []


def test_the_split_depends_on_the_data_alone(tmp_path: Path) -> None:
    whole = ours(tmp_path / "a", (6, 6, 6, 6))
    ours(tmp_path / "b", (6, 6, 6, 6))
    whole.model_copy(update={"shards": whole.shards[::-1]}).save(tmp_path / "b")
    split(tmp_path / "a", 0.4), split(tmp_path / "b", 0.4)
    assert samples(tmp_path / "a" / "validation") == samples(tmp_path / "b" / "validation")
    # One shard is whole there, by a link; of a second one a part.
    in_validation = names(tmp_path / "a" / "validation")
    assert len(in_validation) == 3 and sum("-validation" in name for name in in_validation) == 1


def test_whole_shards_are_linked_and_not_copied(tmp_path: Path) -> None:
    foreign(tmp_path / "theirs", (3, 3, 3))
    inodes = {(tmp_path / "theirs" / f"part-{i}.tar").stat().st_ino for i in range(3)}
    split(tmp_path / "theirs", 0.5)
    parts = list((tmp_path / "theirs" / "validation").glob("*.tar"))
    assert len(parts) == 2 and {p.stat().st_ino for p in parts} <= inodes


def test_a_file_system_without_links_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours(tmp_path, (4, 4))
    before = samples(tmp_path)

    def no_links(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")  # as FAT and some network mounts say

    monkeypatch.setattr(os, "link", no_links)
    split(tmp_path, 0.5)
    assert samples(tmp_path) | samples(tmp_path / "validation") == before


def test_shards_that_are_symbolic_links_stay_readable(tmp_path: Path) -> None:
    foreign(tmp_path / "store", (3, 3))
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "store").iterdir():
        (tmp_path / "data" / path.name).symlink_to(Path("..", "store", path.name))
    before = samples(tmp_path / "data")
    split(tmp_path / "data", 0.7)
    after = samples(tmp_path / "data") | samples(tmp_path / "data" / "validation")
    assert after == before == samples(tmp_path / "store")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_share_out_of_range_is_refused(tmp_path: Path, share: float) -> None:
    ours(tmp_path, (4,))
    with pytest.raises(ValueError, match="validation=.* is not between 0 and 1"):
        split(tmp_path, share)
    assert names(tmp_path) == ["manifest.json", "shard-000000.tar"]


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://bucket/data is a URL; split a copy"):
        split("s3://bucket/data", 0.1)
    with pytest.raises(ValueError, match="manifest.json: cannot be read"):
        split(tmp_path, 0.1)
    assert names(tmp_path) == []
    ours(tmp_path, (9,))
    (tmp_path / "validation").mkdir()
    with pytest.raises(ValueError, match="validation is in the way and no validation set"):
        split(tmp_path, 0.1)
    (tmp_path / "validation").rmdir()
    (tmp_path / "shard-000000-train.tar").touch()
    with pytest.raises(
        ValueError, match="shard-000000-train.tar is in the way of the new training set"
    ):
        split(tmp_path, 0.1)
    (tmp_path / "shard-000000-train.tar").unlink()
    with lock_elsewhere(tmp_path / ".split.lock"), pytest.raises(ValueError, match="is in use by"):
        split(tmp_path, 0.1)
    split(tmp_path, 0.3)
    before = names(tmp_path)
    with pytest.raises(ValueError, match="is split already, .*validation holds 3 samples"):
        split(tmp_path, 0.5)
    training, validation = split(tmp_path, 0.3)
    assert (training.num_samples, validation.num_samples) == (6, 3)
    assert names(tmp_path) == before


class lock_elsewhere:  # noqa: N801 - read as a statement
    """The lock is held by another process."""

    def __init__(self, path: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._held, self._done = context.Event(), context.Event()
        self._process = context.Process(target=self._hold, args=(path,))

    def _hold(self, path: Path) -> None:
        _file = lock(path)
        self._held.set()
        self._done.wait()

    def __enter__(self) -> None:
        self._process.start()
        assert self._held.wait(10)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._process.join()


def test_a_damaged_shard_is_not_cut(tmp_path: Path) -> None:
    ours(tmp_path, (9,))
    path = tmp_path / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shard-000000.tar: its content was altered"):
        split(tmp_path, 0.3)
    assert path.read_bytes() == data and not (tmp_path / "validation").exists()


def test_a_split_that_others_began_removes_its_own_shards_only(tmp_path: Path) -> None:
    """Whoever made a downloaded set may have left what seems the rest of a killed split."""
    precious = tmp_path / "precious.txt"
    for number, name in enumerate(("../precious.txt", "notes.tar", "validation")):
        folder = tmp_path / str(number)
        whole = ours(folder, (5, 4, 6))
        precious.write_text("precious")
        (folder / "notes.tar").write_text("precious")
        staged = folder / "validation" / "training"
        staged.mkdir(parents=True)
        (staged / "superseded.txt").write_text(name)
        bad = whole.model_dump(mode="json")
        bad["shards"][0]["name"] = name
        (staged / "whole.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError):
            split(folder, 0.4)
        assert precious.read_text() == (folder / "notes.tar").read_text() == "precious"
        assert {shard.name for shard in whole.shards} <= set(names(folder))
    (staged / "whole.json").unlink(missing_ok=True)
    staged.mkdir(exist_ok=True)
    (staged / "notes.tar").touch()
    with pytest.raises(ValueError, match="notes.tar is in the way of the new training set"):
        split(folder, 0.4)
    assert (folder / "notes.tar").read_text() == "precious"


CALLS = ("replace", "link", "unlink", "rmdir", "mkdir", "fsync")


def _killed_at(number: int, folder: Path, share: float) -> int:
    """Split in a child that dies before its `number`-th change of the folder; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = number

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return function(*arguments, **keywords)

        return call

    try:
        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        split(folder, share)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("maker", MAKERS)
def test_killed_at_any_step_the_same_command_finishes(tmp_path: Path, maker: str) -> None:
    undisturbed = tmp_path / "undisturbed"
    before = MAKERS[maker](undisturbed, (5, 4, 6))
    whole = samples(undisturbed)
    expected = split(undisturbed, 0.45)
    number, code = 0, 9
    while code == 9:
        folder = tmp_path / str(number)
        MAKERS[maker](folder, (5, 4, 6))
        code = _killed_at(number, folder, 0.45)
        # Whoever reads at this moment finds a data set that is whole, the old one or the new one.
        assert Manifest.load(folder) in (before, expected[0])
        now = samples(folder)
        if (folder / "validation").exists():
            now |= samples(folder / "validation")
        assert now == whole
        if code == 9:
            assert split(folder, 0.45) == expected
        assert samples(folder) == samples(undisturbed)
        assert names(folder) == names(undisturbed)
        assert names(folder / "validation") == names(undisturbed / "validation")
        number += 1
    assert code == 0 and number > 15


def test_another_share_after_a_kill(tmp_path: Path) -> None:
    seen = set()
    for number in range(40):
        folder = tmp_path / str(number)
        ours(folder, (5, 4, 6))
        before = samples(folder)
        if _killed_at(number, folder, 0.45) == 0:
            break
        try:
            split(folder, 0.2)
            seen.add("begun anew")
            assert len(samples(folder / "validation")) == 3
        except ValueError as error:
            assert "is split already, " in str(error) and "holds 7 samples" in str(error)
            seen.add("finished as begun")
        assert samples(folder) | samples(folder / "validation") == before
    assert seen == {"begun anew", "finished as begun"}


def test_values_keep_their_bits(tmp_path: Path) -> None:
    ours(tmp_path, (8,))
    before = {k: np.frombuffer(v, "<f2") for k, (v, _) in samples(tmp_path).items()}
    split(tmp_path, 0.5)
    for key, (values, _) in samples(tmp_path / "validation").items():
        assert np.array_equal(np.frombuffer(values, "<f2"), before[key])
