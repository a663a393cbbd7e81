"""A checkpoint made by a stranger can at worst be refused, and one changed bit is noticed."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import operator
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dit_ds import archive, distributed, export, restore
from dit_ds.archive import MODULE, CheckpointError
from dit_ds.checkpoint_index import checksum
from tests import runs
from tests.conftest import TINY, make_latents, run_ranks

STEP = "step-00000001"
FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"
BIAS, TABLE = "x_embedder.proj.bias", "y_embedder.embedding_table.weight"
FP16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A run with one checkpoint, of two ranks at stage 2 in fp16."""
    folder = tmp_path_factory.mktemp("made")
    make_latents(folder / "latents")
    tree = copy.deepcopy(TINY)
    tree["data"] = {"workers": 0, "path": str(folder / "latents")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    made = {"recipe": folder / "tiny.yaml", "run": folder / "run"}
    made["ds"] = runs.write_json(folder / "ds.json", FP16)
    run_ranks(2, runs.train, *runs.arguments(made, made["ds"], "train.steps=1"))
    return made


@pytest.fixture
def folder(made: Tree, tmp_path: Path) -> Path:
    """The checkpoint in a run of its own, to be tampered with."""
    return copied(made["run"] / "checkpoints" / STEP, tmp_path)


def copied(checkpoint: Path, to: Path) -> Path:
    return Path(shutil.copytree(checkpoint, to / "checkpoints" / STEP))


def forge(folder: Path, change: Callable[[Tree], Any] = lambda index: None) -> None:
    """Alter the index, and make sizes and checksums right again: a stranger can do that much."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    for name, entry in index["files"].items():
        data = (folder / name).read_bytes()
        entry["num_bytes"] = len(data)
        chunks = archive.chunks_of(memoryview(data))
        entry["sha256"] = [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
    change(index)
    index["sha256"] = checksum(index)
    path.write_text(json.dumps(index))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a part."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename(tree: Tree, old: str, new: str) -> None:
    tree[new] = tree.pop(old)


def refused(folder: Path) -> str:
    """What is said of it when it is to be used: by name, short, and steering no terminal."""
    with pytest.raises(ValueError) as error:
        export.from_run(folder.parents[1]).build()
    told = str(error.value)
    assert str(folder) in told
    assert all(c.isprintable() or c == "\n" for c in told) and len(told) < 1500, told
    return told


def nested(depth: int) -> list[Any]:
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


# --------------------------------------------------------------------------- the index


def first(index: Tree) -> Tree:
    return index["files"][FIRST]


def ranges(index: Tree) -> Tree:
    return first(index)["ranges"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda i: i.pop("parameters"), "'parameters': Field required"),
        (lambda i: i.update(hello=1), "'hello': Extra inputs"),
        (lambda i: i.update(step="1"), "'step'"),
        (lambda i: i.update(step=True), "'step'"),
        (lambda i: i.update(step=-1), "'step'"),
        (lambda i: i.update(step=10**400), "'step'"),
        (lambda i: i.update(step=2), "is that of step 2"),
        (lambda i: i.update(format=99), "format 99"),
        (lambda i: i.update(format=nested(50)), "format"),
        (lambda i: i.update(format=2.0), "'format'"),
        (lambda i: i.update(dit_ds="\x1b[2Jgone"), "'dit_ds'"),
        (lambda i: i.update(keys=["fp32"] * 4), "tensors"),
        (lambda i: i.update(keys=["fp32", "../x"]), "'keys.1'"),
        (lambda i: i.update(keys=["fp32/x_embedder"]), "'keys.0'"),
        (lambda i: i.update(keys=["ema"]), "holds no weights"),
        (lambda i: i.update(keys=[0] * 10**6), "'keys.0'"),
        (lambda i: i.update(keys=[f"k{n}" for n in range(10**5)] + ["fp32"]), "tensors"),
        (lambda i: i.update(groups=[0] * 10**6), "'groups.0'"),
        (lambda i: i.update(loss_scaler={f"k{n}": None for n in range(10**5)}), "100000 faults"),
        (lambda i: i.update(metrics={"a": math.nan}), "'metrics.a'"),
        (lambda i: i.update(metrics={"a": math.inf}), "'metrics.a'"),
        (lambda i: i.update(metrics={"a": 10**400}), "'metrics.a'"),
        (lambda i: i.update(metrics={"\x1b]0;title\x07": 1.0}), r"\x1b"),
        (lambda i: i.update(about=nested(150)), "'about'"),
        (lambda i: i.update(about={"a": nested(300)}), "recursion"),
        (lambda i: i["parameters"][BIAS].update(shape=[33]), "holds 32 of 33 values"),
        (lambda i: i["parameters"][BIAS].update(shape=[2**52] * 16), "holds 32 of"),
        (lambda i: i["parameters"][BIAS].update(shape=[1] * 17), "shape"),
        (lambda i: i["parameters"][BIAS].update(shape=[-32]), "shape.0"),
        (lambda i: i["parameters"][BIAS].update(shape=[]), "holds 32 of 1 values"),
        (lambda i: i["parameters"].update(odd={"shape": [2**50]}), "odd holds 0 of"),
        (lambda i: i["parameters"].clear(), "of an unknown"),
        (lambda i: ranges(i).popitem(), "has a gap"),
        (lambda i: ranges(i).update(odd=[0, 1]), "of an unknown odd"),
        (lambda i: ranges(i).update({BIAS: [0, 33]}), "holds 33 of 32 values"),
        (lambda i: ranges(i).update({BIAS: [1, 31]}), "has a gap or an overlap at 0"),
        (lambda i: ranges(i).update({BIAS: [0, 0]}), "ranges"),
        (lambda i: ranges(i).update({BIAS: [-1, 33]}), "ranges"),
        (lambda i: ranges(i).update({BIAS: [0, 2**60]}), "ranges"),
        (lambda i: ranges(i).update({BIAS: [0, 32, 0]}), "ranges"),
        (lambda i: i["files"][SECOND]["ranges"].update({BIAS: [0, 32]}), "a gap or an overlap"),
        (lambda i: i["files"][MODULE]["ranges"].update({BIAS: [0, 32]}), "a gap or an overlap"),
        (lambda i: rename(i["files"], FIRST, SECOND), "values"),
        (lambda i: rename(i["files"], FIRST, "rank-00007.safetensors"), "cannot be read"),
        (lambda i: rename(i["files"], FIRST, "../rank-00000.safetensors"), "files"),
        (lambda i: rename(i["files"], FIRST, "/etc/passwd"), "files"),
        (lambda i: rename(i["files"], FIRST, "rank-00000.safetensors\n"), "files"),
        (lambda i: i["files"].pop(MODULE), "holds no module"),
        (lambda i: first(i).update(num_bytes=1), "1 were written"),
        (lambda i: first(i).update(num_bytes=-1), "num_bytes"),
        (lambda i: first(i).update(num_bytes=1e5), "num_bytes"),
        (lambda i: first(i).update(sha256=[]), "has 0 checksums"),
        (lambda i: first(i)["sha256"].append("0" * 64), "has 2 checksums"),
        (lambda i: first(i).update(sha256=["0" * 64]), "altered since it was written"),
        (lambda i: first(i).update(sha256=["x"]), "sha256"),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(
    folder: Path, change: Callable[[Tree], Any], sentence: str
) -> None:
    forge(folder, change)
    assert sentence in refused(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"\x00" * 100,
        b"[]",
        b"{}",
        b"[" * 10**6,
        b'{"format": 2}',
        b'{"format": ' + b"9" * 10**4 + b"}",
        b'{"format": 2, "sha256": "\\ud800"}',
        b'{"format": 2, "about": ' + b'{"a":' * 10**5,
    ],
    ids=lambda content: "content",
)
def test_what_is_no_index_is_refused(folder: Path, content: bytes) -> None:
    (folder / "index.json").write_bytes(content)
    refused(folder)


def test_an_index_that_says_a_thing_twice_says_the_last(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text('{"step": 7, ' + path.read_text()[1:])
    assert archive.Checkpoint.open(folder).step == 1


# --------------------------------------------------------------------------- files


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["index.json", FIRST, SECOND, MODULE])
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder", "nothing", "huge"])
def test_what_is_no_plain_file_is_refused_at_once(folder: Path, kind: str, name: str) -> None:
    path = folder / name
    path.rename(folder.parent / name)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(folder.parent / name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**40)
    if (name, kind) != ("index.json", "nothing"):  # then it is not committed
        assert str(path) in refused(folder)
    with pytest.raises(CheckpointError):  # one of the ranks that share the work
        for rank in (2, 1, 0):
            archive.Checkpoint.open(folder).verify(rank, 3)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "huge", "nonsense"])
def test_latest_is_only_a_hint(folder: Path, kind: str) -> None:
    path = folder.parent / "latest"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(2**40)
    else:
        path.write_bytes(b"../../\xff\x1b[2J")
    assert restore.newest(folder.parent) is not None


def raw(header: Any, values: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file of any header, with any length told of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + values


def tensor(dtype: str, shape: list[int], start: int, stop: int) -> Tree:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("name", [FIRST, MODULE])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        raw({}, size=2**63),
        raw({}, size=2**26),
        raw(b"\xff\xff"),
        raw(b"[" * 10**5),
        raw(b'{"a":' * 10**5),
        raw({"a": 1}),
        raw({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 2, 6)}, b"abcdefgh"),
        raw({"a": tensor("F32", [1], 4, 8)}, b"abcdefgh"),
        raw({"a": tensor("F32", [1], 4, 0)}, b"abcd"),
        raw({"a": tensor("F32", [1], 0, 2**62)}, b"abcd"),
        raw({"a": tensor("F32", [2**62, 4], 0, 0)}),
        raw({"a": tensor("F32", [-1], 0, 4)}, b"abcd"),
        raw({"a": tensor("X", [1], 0, 4)}, b"abcd"),
        raw({"\x1b[2J": tensor("F32", [1], 1, 4)}, b"abcd"),
        raw({"\x1b[2J": tensor("F32", [1], 0, 4)}, b"abcd"),
        raw({"a": tensor("C64", [1], 0, 8)}, b"abcdefgh"),
        raw({"a": tensor("F4", [2], 0, 1)}, b"a"),
        raw({"pos_embed": tensor("F32", [0, 2**62], 0, 0)}),
        raw({"pos_embed": tensor("F32", [1] * 10**5, 0, 4)}, b"abcd"),
    ],
    ids=lambda content: "content",
)
def test_a_part_with_an_odd_header_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    forge(folder)
    refused(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(f"ema/{BIAS}"), "tensors"),
        (lambda t: t.update(odd=torch.ones(1)), "tensors"),
        (lambda t: rename(t, f"ema/{BIAS}", "\x1b[2J"), "in the file or the index alone"),
        (lambda t: t.update({f"ema/{BIAS}": torch.ones(31)}), r"[31], expected F32 [32]"),
        (lambda t: t.update({f"ema/{BIAS}": torch.ones(4, 8)}), r"[4, 8], expected F32 [32]"),
        (lambda t: t.update({f"ema/{BIAS}": torch.ones(32).half()}), "F16"),
        (lambda t: t.update({f"ema/{BIAS}": torch.ones(32).long()}), "I64"),
        (lambda t: t.clear(), "0 tensors"),
    ],
)
def test_a_part_of_other_tensors_is_refused(
    folder: Path, change: Callable[[Tree], Any], sentence: str
) -> None:
    rewrite(folder / FIRST, change)
    forge(folder)
    told = refused(folder)
    assert sentence in told and FIRST in told


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["index.json", FIRST, MODULE, "mp_rank_00_model_states.pt"])
def test_a_pickle_is_never_run(folder: Path, name: str, zipped: bool) -> None:
    marker = folder.parent / "unpickled"
    torch.save(Exploit(marker), folder / name, _use_new_zipfile_serialization=zipped)
    if name == "mp_rank_00_model_states.pt":  # nobody names it, so nobody reads it
        export.from_run(folder.parents[1]).build()
    else:
        if name != "index.json":
            forge(folder)
        refused(folder)
    assert not marker.exists()


def test_one_changed_bit_of_a_part_is_noticed_wherever_it_is(folder: Path) -> None:
    for name in (FIRST, SECOND, MODULE):
        path = folder / name
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        spread = range(start, len(data), max(1, len(data) // 40))
        for at in [*range(0, start, max(1, start // 30)), start, *spread, len(data) - 1]:
            bit = 1 << at % 8
            data[at] ^= bit
            path.write_bytes(data)
            assert name in refused(folder)
            data[at] ^= bit
        path.write_bytes(data)
        for other in (data[:-1], data + b"\0", data[:start]):
            path.write_bytes(other)
            assert f"{name}: {len(other)} bytes, {len(data)} were written" in refused(folder)
        path.write_bytes(data)
    export.from_run(folder.parents[1])


def test_one_changed_byte_of_the_index_is_noticed_wherever_it_is(folder: Path) -> None:
    path = folder / "index.json"
    data, whole = bytearray(path.read_bytes()), archive.Checkpoint.open(folder)
    for at in range(0, len(data), 3):
        old, data[at] = data[at], data[at] ^ (1 << at % 7)
        path.write_bytes(data)
        try:
            assert archive.Checkpoint.open(folder) == whole  # 1e-08 may become 1E-08
        except CheckpointError as error:
            assert str(folder) in str(error)
        data[at] = old


# --------------------------------------------------------------------------- what it says of itself


def about(name: str, value: Any) -> Callable[[Tree], Any]:
    """Change what the weights are described by; `model.depth` is in the part `model`."""
    *path, last = name.split(".")

    def change(index: Tree) -> None:
        functools.reduce(operator.getitem, path, index["about"]["weights"])[last] = value

    return change


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda i: i["about"].clear(), "not a description"),
        (lambda i: i["about"].update(weights="DiT"), "not a description"),
        (lambda i: i["about"]["weights"].pop("model"), "'model': Field required"),
        (lambda i: i["about"]["weights"].update({"\x1b[2J": 1}), "not a description"),
        (about("format", 7), "format 7"),
        (about("model", [32]), "'model'"),
        (about("model.odd", 1), "'model.odd'"),
        (about("model.depth", 10**9), "blocks"),
        (about("model.depth", 3), "missing     blocks.2"),
        (about("model.depth", "2"), "'model.depth'"),
        (about("model.hidden_size", 10**9), "pos_embed"),
        (about("model.hidden_size", 10**400), "'model.hidden_size'"),
        (about("model.hidden_size", 32.0), "'model.hidden_size'"),
        (about("model.patch_size", 0), "'model.patch_size'"),
        (about("model.num_heads", 5), "num_heads=5"),
        (about("model.mlp_ratio", 10.0**300), "'model.mlp_ratio'"),
        (about("model.mlp_ratio", 999.0), "mlp.fc1"),
        (about("model.learn_sigma", False), "final_layer"),
        (about("model.num_classes", 2**31 - 1), "not of 3 classes"),
        (about("model.input_size", 10**9), "not of latents"),
        (about("latent_shape", [4, 4]), "latent_shape"),
        (about("latent_shape", 4), "latent_shape"),
        (about("class_names", 3), "class_names"),
        (about("class_names", []), "not of 0 classes"),
        (about("objective.num_timesteps", 10**12), "num_timesteps"),
        (about("objective.name", "gan"), "objective.name"),
        (about("objective", {"name": "flow"}), "flow matching does not learn"),
        (about("scaling_factor", math.nan), "scaling_factor"),
        (about("vae", ["a"]), "'vae'"),
    ],
)
def test_a_description_of_another_model_is_refused_before_it_is_built(
    folder: Path, change: Callable[[Tree], Any], sentence: str
) -> None:
    forge(folder, change)
    assert sentence in refused(folder)


def test_a_description_of_patches_as_large_as_nothing_is_refused(folder: Path) -> None:
    def change(index: Tree) -> None:
        index["about"]["weights"]["model"] |= {"input_size": 2 * 10**8, "patch_size": 10**8}
        index["about"]["weights"]["latent_shape"] = [4, 2 * 10**8, 2 * 10**8]

    forge(folder, change)
    assert "do not fit their description" in refused(folder)


def test_an_export_of_a_stranger_is_refused(folder: Path, tmp_path: Path) -> None:
    path, beside = tmp_path / "ema.safetensors", tmp_path / "ema.json"
    export.save(export.from_run(folder.parents[1]), path)
    text = beside.read_text()
    for other in ("[" * 10**6, "", "[]", '"a"', text.replace('"depth": 2', '"depth": 1000000000')):
        beside.write_text(other)
        with pytest.raises(ValueError, match=r"ema"):
            export.load(path)
    beside.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"ema"):
        export.load(path)
    beside.write_text(text)
    rewrite(path, lambda t: t.update({BIAS: t[BIAS].half()}))
    with pytest.raises(ValueError, match=r"not all float32"):
        export.load(path)
    torch.save(Exploit(tmp_path / "unpickled"), path)
    with pytest.raises(ValueError, match=r"ema\.safetensors"):
        export.load(path)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.clear(),
        lambda a: a.update(config=7),
        lambda a: a["config"].update({"\x1b[2J": 1}),
        lambda a: a["config"].update({f"k{n}": 1 for n in range(10**5)}),
        lambda a: a["config"].update(name="\x1b[2J" * 10**4, seed="\x1b"),
        lambda a: a["config"].update(optimizer=[1]),
        lambda a: a["config"].update(seed=10**400),
        lambda a: a["config"].update(nested=nested(150)),
        lambda a: a.update(weights=[]),
        lambda a: a["weights"].update(model="\x1b[2J"),
        lambda a: a["weights"]["model"].update(depth="\x1b[2J" * 10**4),
        lambda a: a.update(precision="\x1b[2J" * 10**4),
        lambda a: a.update(dataset=nested(150)),
        lambda a: a.update(order="\x1b[2J"),
    ],
)
@pytest.mark.timeout(60)
def test_training_does_not_go_on_from_what_is_not_its_own(
    made: Tree, folder: Path, change: Callable[[Tree], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from dit_ds import config, rundir, zero_config
    from dit_ds.manifest import Manifest

    forge(folder, lambda index: change(index["about"]))
    cfg = config.load(str(made["recipe"]))
    ours = rundir.describe(cfg, zero_config.load(made["ds"]), Manifest.load(cfg.data.path))
    found = restore.newest(folder.parent)
    with pytest.raises(ValueError) as error:
        rundir.check_resume(found, cfg, ours, folder.parents[1])
    with pytest.raises(SystemExit):
        distributed.exit_with(error.value)
    told = capsys.readouterr().err
    assert all(c.isprintable() or c == "\n" for c in told) and len(told) < 3000, told


# --------------------------------------------------------------------------- into an engine


def of_all(key: str, change: Callable[[Tree], Any]) -> Callable[[Tree], Any]:
    def changed(index: Tree) -> None:
        for parameter in index["parameters"].values():
            change(parameter[key])

    return changed


def forge_tensors(index: Callable[[Tree], Any], **parts: Callable[[Tree], Any]) -> Any:
    """A forgery that changes tensors of files and then the index."""

    def forgery(folder: Path) -> None:
        for name, change in parts.items():
            for path in folder.glob(f"{name}*.safetensors"):
                rewrite(path, change)
        forge(folder, index)

    return forgery


def rename_parameter(tensors: Tree) -> None:
    for name in [n for n in tensors if n.endswith(BIAS)]:
        rename(tensors, name, name.replace(BIAS, "other"))


def rename_in_index(index: Tree) -> None:
    rename(index["parameters"], BIAS, "other")
    for entry in index["files"].values():
        if BIAS in entry["ranges"]:
            rename(entry["ranges"], BIAS, "other")


def without(key: str) -> Callable[[Tree], Any]:
    return lambda t: [t.pop(name) for name in list(t) if name.startswith(key)]


def with_hessian(tensors: Tree) -> None:
    tensors |= {n.replace("ema", "hessian"): t * 1 for n, t in tensors.items() if n[:3] == "ema"}


def nothing(tree: Tree) -> None:
    pass


def fp4(folder: Path) -> None:
    header = {"pos_embed": tensor("F4", [1, 4, 32], 0, 64)}
    (folder / MODULE).write_bytes(raw(header, b"a" * 64))
    forge(folder)


def group(**values: Any) -> Any:
    return forge_tensors(lambda i: i["groups"][0].update(values))


FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shape": (forge_tensors(lambda i: i["parameters"][TABLE].update(shape=[32, 4])), TABLE),
    "a name": (forge_tensors(rename_in_index, rank=rename_parameter), "other"),
    "a buffer's shape": (
        forge_tensors(nothing, module=lambda t: t.update(pos_embed=torch.ones(4, 32))),
        "pos_embed",
    ),
    "no buffer": (forge_tensors(nothing, module=lambda t: t.clear()), "pos_embed"),
    "a buffer more": (forge_tensors(nothing, module=lambda t: t.update(odd=torch.ones(1))), "odd"),
    "a parameter twice": (
        forge_tensors(nothing, module=lambda t: t.update({BIAS: torch.ones(32)})),
        BIAS,
    ),
    "a buffer of fp4": (fp4, "F4"),
    "no ema": (forge_tensors(lambda i: i["keys"].remove("ema"), rank=without("ema")), "optimizer"),
    "a hessian": (
        forge_tensors(lambda i: i["keys"].append("hessian"), rank=with_hessian),
        "optimizer",
    ),
    "no step": (forge_tensors(of_all("scalars", lambda s: s.clear())), "optimizer"),
    "another scalar": (forge_tensors(of_all("scalars", lambda s: s.update(k=1.0))), "optimizer"),
    "two steps": (
        forge_tensors(lambda i: i["parameters"][TABLE]["scalars"].update(step=7.0)),
        "not at one step",
    ),
    "no groups": (forge_tensors(lambda i: i["groups"].clear()), "in 0 groups"),
    "two groups": (forge_tensors(lambda i: i["groups"].append({})), "in 2 groups"),
    "a word for a number": (group(lr="\x1b[2J"), "lr"),
    "a list for a number": (group(eps=[1e-8, 1e-8]), "eps"),
    "lists in lists": (group(betas=[[0.9], [0.99]]), "betas"),
    "one beta": (group(betas=[0.9]), "betas"),
    "true for a number": (group(weight_decay=True), "weight_decay"),
    "no number": (group(ema_decay=math.nan), "ema_decay"),
    "infinity": (group(lr=math.inf), "lr"),
    "no float": (group(weight_decay=10**400), "weight_decay"),
    "a scaler's names": (
        forge_tensors(lambda i: i["loss_scaler"].update(dynamic=0.0)),
        "loss scaler",
    ),
}


def bits(engine: Any) -> dict[str, torch.Tensor]:
    """All that a load may change."""
    from dit_ds import zero

    found = {name: t.detach().clone() for name, t in engine.module.state_dict().items()}
    optimizer = zero.client_optimizer(engine)
    for i, flat in enumerate(zero.flats(engine)):
        found[f"master/{i}"] = flat.tensor.detach().clone()
        for key, value in optimizer.state[flat.tensor].items():
            found[f"{key}/{i}"] = value.clone()
    for i, values in enumerate(optimizer.param_groups):
        told = json.dumps({k: v for k, v in values.items() if k != "params"}, sort_keys=True)
        found[f"group/{i}"] = torch.tensor(list(told.encode()))
    return found


def attack(recipe: str, ds: str, root: str, names: list[str]) -> tuple[dict[str, str], list[str]]:
    """What one engine says of each checkpoint, and which of them changed it."""
    engine, _ = runs.engine(recipe, ds)
    told, changed = {}, []
    for name in names:
        before = bits(engine)
        try:
            found = restore.newest(Path(root) / name / "checkpoints", strict=True)
            assert found is not None
            restore.load(engine, found)
            told[name] = "loaded"
        except distributed.RankError as error:
            told[name] = str(error)
        after = bits(engine)
        if before.keys() != after.keys() or any(not before[k].equal(after[k]) for k in before):
            changed.append(name)
    distributed.shutdown()
    return told, changed


def test_what_does_not_fit_the_engine_is_refused_before_it_changes_anything(
    made: Tree, tmp_path: Path
) -> None:
    whole = made["run"] / "checkpoints" / STEP
    for name, (forgery, _) in FORGERIES.items():
        forgery(copied(whole, tmp_path / name))
    # What is not known is not taken over, and what nobody names is not read.
    harmless = copied(whole, tmp_path / "harmless")
    (harmless / "rank-00009.safetensors").write_bytes(b"odd")
    group(params=[1, 2], odd=7, fused="odd")(harmless)
    names = [*FORGERIES, "harmless"]
    ((told, changed),) = run_ranks(
        1, attack, str(made["recipe"]), str(made["ds"]), str(tmp_path), names
    )
    for name, (_, sentence) in FORGERIES.items():
        assert sentence in told[name], (name, told[name])
        assert str(tmp_path / name) in told[name] and "\x1b" not in told[name], told[name]
    assert told["harmless"] == "loaded" and changed == ["harmless"]


# --------------------------------------------------------------------------- anything


ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 32, 2**31, 2**53, 2**64, 10**400, 1.5, -0.0, 1e308),
    *(math.nan, math.inf, "", "x", "fp32", BIAS, FIRST, "../x", "/etc/passwd", "\x1b[2J", "\ud800"),
    *("a" * 5000, [], {}, [[]], [0], [0, 1], [1, 0], [None], {"a": 1}, {"": 0}, nested(250)),
]  # fmt: skip


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) of a tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from nodes(tree[key])


def mutate(tree: Tree, rng: random.Random) -> None:
    """Replace, remove, add or exchange anything."""
    shallow = rng.random() < 0.5  # where most of the meaning is
    places = [(t, k) for t, k in nodes(tree) if not shallow or t is tree or k in tree["about"]]
    container, key = rng.choice(places)
    what = rng.random()
    if what < 0.6:
        container[key] = copy.deepcopy(rng.choice(ODD))
    elif what < 0.75:
        del container[key]
    elif isinstance(container, dict):
        other = rng.choice([str(o) for o in ODD] + list(container))
        container[other] = copy.deepcopy(rng.choice([*ODD, container[key]]))
    else:
        container.insert(key, copy.deepcopy(rng.choice(ODD)))


def tamper(folder: Path, rng: random.Random) -> None:
    """Change the index or the bytes of a part, and make checksums right again."""
    if rng.random() < 0.6:
        forge(folder, lambda index: mutate(index, rng))
        return
    path = folder / rng.choice([FIRST, SECOND, MODULE])
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(header if rng.random() < 0.9 else len(data))
        data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), *b'0123456789"{}[],:eE-FI'])
    path.write_bytes(data)
    forge(folder)


def try_anything(whole: str, scratch: str) -> tuple[int, int]:
    """Tampered checkpoints, with 200 MB to spend; how many were refused and how many taken."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    most = int(status["VmData"].split()[0]) * 1024 + 200 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    index = archive.Checkpoint.open(Path(whole)).index
    shapes = {name: p.shape for name, p in index.parameters.items()} | {"pos_embed": [1, 4, 32]}
    counts = [0, 0]

    @settings(max_examples=400, deadline=5000, derandomize=True, database=None)
    @given(st.randoms(use_true_random=True))
    def attempt(rng: random.Random) -> None:
        run = Path(scratch) / "run"
        shutil.rmtree(run, ignore_errors=True)
        folder = copied(Path(whole), run)
        tamper(folder, rng)
        try:
            weights = export.from_run(run)
        except ValueError as error:
            told = str(error)
            assert str(folder) in told
            assert all(c.isprintable() or c == "\n" for c in told), told
            counts[0] += 1
        else:  # other values, or of other steps, yet whole
            weights.build()
            assert {name: list(t.shape) for name, t in weights.state.items()} == shapes
            counts[1] += 1

    attempt()
    return counts[0], counts[1]


def test_whatever_is_changed_is_refused_or_loads_whole(made: Tree, tmp_path: Path) -> None:
    whole = str(made["run"] / "checkpoints" / STEP)
    ((num_refused, num_taken),) = run_ranks(1, try_anything, whole, str(tmp_path))
    assert num_refused > 100 and num_taken > 10
