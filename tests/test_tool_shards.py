"""`tools/shards.py`: every kind of damage is named, and each command works from any folder."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_ds import adopt
from dit_ds.indexed import INDEX_SUFFIX
from dit_ds.manifest import Folder, Manifest, ShardInfo
from dit_ds.shards import ShardWriter
from dit_ds.verify import verify
from tests.conftest import REPO, hear_ctrl_c, make_latents
from tests.test_indexed import VAE, foreign, latent, npy, npy_and_cls, write_tar


def tool(folder: Path, *arguments: str, expect: int = 0) -> str:
    """The output of the tool, run in `folder`."""
    command = [sys.executable, str(REPO / "tools" / "shards.py"), *arguments]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def facts(folder: Path, *arguments: str, expect: int = 0) -> dict[str, Any]:
    output = tool(folder, *arguments, "--json", expect=expect)
    return json.loads(output.splitlines()[-1])


def faults(folder: Path) -> list[str]:
    found = verify(Folder(folder), workers=1).faults
    return [fault.removeprefix(f"{folder}/") for fault in found]


def change(path: Path, position: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[position : position + len(content)] = content
    path.write_bytes(data)


def restamp(folder: Path, number: int = 0, **values: Any) -> None:
    """Have the manifest take a shard as it is, as if it had been written so."""
    manifest = Manifest.load(folder)
    info = manifest.shards[number]
    data = (folder / info.name).read_bytes()
    new = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | values
    shards = list(manifest.shards)
    shards[number] = ShardInfo(**{**info.model_dump(), **new})
    manifest.model_copy(update={"shards": tuple(shards)}).save(folder)


def _swap(folder: Path) -> None:
    a, b = folder / "shard-000000.tar", folder / "shard-000001.tar"
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)


def _written(folder: Path, keys: list[str], label: int = 0, value: float = 0.0) -> None:
    with ShardWriter(folder / "shard-000001.tar") as shard:
        for key in keys:
            shard.add(key, np.full((2, 8, 4, 4), value, np.float16), label)
    restamp(folder, 1, num_samples=len(keys))


def _listed_twice(folder: Path) -> None:
    manifest = Manifest.load(folder)
    manifest.model_copy(update={"shards": (*manifest.shards, manifest.shards[0])}).save(folder)


OURS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (lambda d: (d / "shard-000001.tar").unlink(), ["shard-000001.tar: cannot be read"]),
    "swapped": (_swap, [f"shard-00000{i}.tar: its content was altered" for i in (0, 1)]),
    "wrong count": (
        lambda d: restamp(d, 1, num_samples=3),
        ["shard-000001.tar: .* bytes cannot hold 3 samples"],
    ),
    "wrong label": (
        lambda d: _written(d, ["a", "b"], label=3),
        [f"shard-000001.tar: sample {k} has the label b'3', not one of 0-2" for k in "ab"],
    ),
    "nan": (
        lambda d: _written(d, ["a"], value=np.nan),
        ["shard-000001.tar: sample a holds values that are not finite"],
    ),
    "inf": (
        lambda d: _written(d, ["a"], value=-np.inf),
        ["shard-000001.tar: sample a holds values that are not finite"],
    ),
    "key twice in a shard": (
        lambda d: _written(d, ["a", "b", "a"]),
        ["shard-000001.tar: key a twice"],
    ),
    "keys in two shards": (
        lambda d: _written(d, ["000000003", "000000001", "z"]),
        ["shard-000000.tar: key 00000000[13] and 1 more keys also in shard-000001.tar"],
    ),
    "shard listed twice": (
        _listed_twice,
        [
            "shard-000000.tar: the manifest names it twice",
            "shard-000000.tar: key .* and 3 more keys also in shard-000000.tar",
        ],
    ),
}


def matches(found: list[str], expected: list[str]) -> None:
    assert len(found) == len(expected), found
    for fault, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, fault), (fault, pattern)


@pytest.mark.parametrize("kind", OURS)
def test_damage_to_our_shards_is_named(tmp_path: Path, kind: str) -> None:
    make_latents(tmp_path, (4, 4, 3))
    assert faults(tmp_path) == []
    damage, expected = OURS[kind]
    damage(tmp_path)
    matches(faults(tmp_path), expected)


def test_cuts_and_flipped_bits_of_our_shards_are_named(tmp_path: Path) -> None:
    manifest = make_latents(tmp_path, (4, 4))
    path = tmp_path / "shard-000001.tar"
    whole = path.read_bytes()
    sample = (len(whole) - 1024) // 4
    for size in (2 * sample, len(whole) - 1024, 2 * sample + 700, 0):
        path.write_bytes(whole[:size])
        matches(faults(tmp_path), [f"shard-000001.tar: has {size} bytes, not the {len(whole)}"])
    altered = f"shard-000001.tar: its content was altered: sha256 .*{manifest.shards[1].sha256}"
    for position, also in (
        (sample, ["sample 1 is not KEY.moments.npy followed by KEY.cls"]),  # a name
        (sample + 512 + 20, ["sample 000000005 is not float16 moments of shape"]),  # npy header
        (2 * sample + 800, []),  # values
        (3 * sample - 512, ["sample 000000006 has the label b'P'"]),  # a label
    ):
        path.write_bytes(whole)
        change(path, position, bytes([whole[position] ^ 0x60]))
        matches(faults(tmp_path), [altered, *also])


def test_every_fault_of_every_shard_is_named(tmp_path: Path) -> None:
    make_latents(tmp_path, (3, 3, 3, 3))
    (tmp_path / "shard-000000.tar").unlink()
    change(tmp_path / "shard-000002.tar", 3000, b"???")
    last = tmp_path / "shard-000003.tar"
    last.write_bytes(last.read_bytes()[:-512])
    (tmp_path / "shard-000009.tar").touch()
    (tmp_path / "shard-000001.tar.tmp").touch()
    found = facts(tmp_path.parent, "verify", tmp_path.name, "--workers", "2", expect=1)
    matches(
        found["faults"],
        [
            "000000.tar: cannot be read",
            "000002.tar: its content",
            "000003.tar: has .* bytes",
        ],
    )
    matches(found["notes"], ["000001.tar.tmp: not in the man", "000009.tar: not in the manifest"])


def _foreign_label(folder: Path) -> None:
    manifest = Manifest.load(folder)
    manifest.model_copy(update={"class_names": ("a", "b")}).save(folder)


def _foreign_nan(folder: Path) -> None:
    index = np.load(folder / ("part-1.tar" + INDEX_SUFFIX), allow_pickle=False)
    change(folder / "part-1.tar", int(index[2, 1]), b"\xff\xff")
    restamp(folder, 1)


def _foreign_header(folder: Path) -> None:
    index = np.load(folder / ("part-1.tar" + INDEX_SUFFIX), allow_pickle=False)
    change(folder / "part-1.tar", int(index[1, 0]), b"?")
    restamp(folder, 1)


THEIRS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (lambda d: (d / "part-0.tar").unlink(), ["part-0.tar: cannot be read"]),
    "no index": (
        lambda d: (d / ("part-1.tar" + INDEX_SUFFIX)).unlink(),
        ["part-1.tar.index.npy: cannot be read"],
    ),
    "altered index": (
        lambda d: change(d / ("part-0.tar" + INDEX_SUFFIX), 150, b"\7"),
        ["part-0.tar: its index part-0.tar.index.npy was altered"],
    ),
    "cut at a member": (
        lambda d: (d / "part-0.tar").write_bytes((d / "part-0.tar").read_bytes()[:4096]),
        ["part-0.tar: has 4096 bytes, not"],
    ),
    "flipped": (
        lambda d: change(d / "part-1.tar", 900, b"\0"),
        ["part-1.tar: its content"],
    ),
    "wrong count": (
        lambda d: restamp(d, num_samples=4),
        [r"part-0.tar: its index part-0.tar.index.npy is <i8 of shape \(5, 3\), not .* \(4, 3\)"],
    ),
    "wrong label": (
        _foreign_label,
        [f"sample 0000{i} has the label 2, not one of 0-1" for i in (2, 5, 8)],
    ),
    "nan": (_foreign_nan, ["part-1.tar: sample 00007 holds values that are not finite"]),
    "no header": (_foreign_header, ["part-1.tar: no sample begins at byte"]),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_damage_to_shards_of_others_is_named(tmp_path: Path, kind: str) -> None:
    foreign(tmp_path)
    assert faults(tmp_path) == []
    damage, expected = THEIRS[kind]
    damage(tmp_path)
    matches(faults(tmp_path), expected)


def test_others_may_number_each_shard_anew(tmp_path: Path) -> None:
    for part in range(2):
        files = [(f"{i}.npy", npy(latent(i + 10 * part))) for i in range(3)]
        write_tar(tmp_path / f"{part}.tar", files)
    adopt.index(tmp_path, vae=VAE, image_size=48, values="latents")
    verdict = verify(Folder(tmp_path))
    assert verdict.faults == []
    matches(verdict.notes, ["0.tar: key . and 2 more keys also in 1.tar"])


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.3,
    )
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_index_verify_show_and_split_from_another_folder(tmp_path: Path, vae: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "x-0.tar", [*npy_and_cls(range(20)), ("00000.txt", b"hello")])
    write_tar(data / "x-1.tar", npy_and_cls(range(20, 30)))
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\ncat\r\n")
    (tmp_path / "twice.txt").write_text("ant\nbee\nant\n")
    by_hand = ["index", "data", "--scaling-factor", "0.3", "--image-size", "12"]
    asked = tool(tmp_path, *by_hand, expect=2)
    assert "give one: moments, latents" in asked and not (data / "manifest.json").exists()
    twice = tool(tmp_path, *by_hand, "--classes", "twice.txt", expect=2)
    assert "classes=twice.txt: names 'ant' twice" in twice
    made = facts(
        tmp_path,
        *("index", "data", "--vae", "vae", "--values", "scaled_latents", "--classes", "names.txt"),
    )
    assert made["image_size"] == 12  # this VAE has two pixels to a latent pixel
    assert made["scaling_factor"] == 0.3
    assert made["ignored"] == {".txt": 1} and made["num_samples"] == 30
    assert facts(tmp_path, "verify", "data")["faults"] == []
    shown = tool(tmp_path, "show", "data", "--classes")
    assert "3: ant, bee, cat" in shown and "10 bee" in shown and made["fingerprint"] in shown
    cut = facts(tmp_path, "split", "data", "--validation", "0.1")
    assert cut["validation"]["num_samples"] == 3 and cut["training"]["num_samples"] == 27
    assert facts(tmp_path, "show", "data")["fingerprint"] == cut["training"]["fingerprint"]
    assert facts(tmp_path, "verify", "data/validation")["num_samples"] == 3
    assert "is split already" in tool(tmp_path, "split", "data", "--validation", "0.2", expect=2)


def test_index_by_hand_and_its_warning(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", npy_and_cls(range(4)))
    needs = tool(tmp_path, "index", ".", "--values", "latents", expect=2)
    assert "give --vae, or --scaling-factor, --image-size" in needs
    by_hand = ["index", ".", "--values", "latents", "--image-size", "48", "--scaling-factor"]
    assert "standard deviation 0.0971" in tool(tmp_path, *by_hand, "0.1")
    (tmp_path / "manifest.json").unlink()
    assert "WARNING" not in tool(tmp_path, *by_hand, "1")


def test_ctrl_c_leaves_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", npy_and_cls(range(4)))
    os.mkfifo(tmp_path / "names.txt")  # nobody writes it, so the tool waits until it is interrupted
    command = [sys.executable, str(REPO / "tools" / "shards.py"), "index", ".", "--classes"]
    process = subprocess.Popen(
        [*command, "names.txt"], cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c
    )
    with open(tmp_path / "names.txt", "wb"):  # opens when the tool does
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == b"interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("command", ["verify", "show"])
def test_a_folder_without_a_manifest_is_a_mistake(tmp_path: Path, command: str) -> None:
    assert "error: nowhere/manifest.json" in tool(tmp_path, command, "nowhere", expect=2)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of a web server that serves tmp_path."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_is_verified(tmp_path: Path, url: str) -> None:
    foreign(tmp_path / "theirs", (3, 2))
    make_latents(tmp_path / "ours", (4, 4))
    assert facts(tmp_path, "verify", f"{url}/theirs", "--workers", "2")["faults"] == []
    assert facts(tmp_path, "show", f"{url}/ours", "--classes")["class_counts"] == [3, 3, 2]
    (tmp_path / "ours" / "shard-000001.tar").unlink()
    found = facts(tmp_path, "verify", f"{url}/ours", expect=1)["faults"]
    matches(found, [f"{url}/ours/shard-000001.tar"])
