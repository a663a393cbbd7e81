"""Which images a source names: folders, text files, tars; their classes, order and mistakes."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from dit_ds import labels, sources
from dit_ds.sources import Listing, Tars, open_source, read_list
from dit_ds.units import ItemReader, Rejection, TarSource, TarUnits
from tests.conftest import run_ranks


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def in_order_of_names(listing: Listing) -> list[tuple[str, int]]:
    return sorted(zip(listing.paths, listing.labels, strict=True))


def test_a_folder_of_images_alone_is_a_set_without_classes(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    listing = open_source(str(tmp_path))
    assert isinstance(listing, Listing)
    assert in_order_of_names(listing) == [("a.JPG", 0), ("b.png", 0)]
    assert (listing.class_names, listing.num_skipped) == (("images",), 1)


def test_class_folders_may_hold_links_and_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    for place in ("set/cat", "set/dog/deeper", "elsewhere/more"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.png").write_bytes(b"")
    (tmp_path / "set/cat/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/bird").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/dog/gone.png").symlink_to("nowhere")  # its reader will tell
    listing = open_source(str(tmp_path / "set"))
    assert isinstance(listing, Listing)
    assert in_order_of_names(listing) == [
        ("bird/more/a.png", 0),
        ("cat/a.png", 1),
        ("cat/link/more/a.png", 1),
        ("dog/deeper/a.png", 2),
        ("dog/gone.png", 2),
    ]
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set/cat")
    with pytest.raises(ValueError, match="back.* links to a folder that it lies in; remove"):
        open_source(str(tmp_path / "set"))
    (tmp_path / "elsewhere/back").unlink()
    (tmp_path / "elsewhere/back").symlink_to("back")
    with pytest.raises(ValueError, match="back cannot be read .Too many levels"):
        open_source(str(tmp_path / "set"))


def _list_as_nobody(root: str) -> str:
    if os.geteuid() == 0:  # whom no permission stops
        os.seteuid(65534)
    with pytest.raises(ValueError) as caught:
        open_source(root)
    return str(caught.value)


def test_a_folder_without_permission_is_told() -> None:
    with tempfile.TemporaryDirectory() as root:  # `tmp_path` lies in a folder of its user
        locked = Path(root, "cat", "deeper")
        locked.mkdir(parents=True)
        (locked.parent / "a.png").write_bytes(b"")
        os.chmod(root, 0o755)
        locked.chmod(0)
        (told,) = run_ranks(1, _list_as_nobody, root)
        assert f"images: {locked} cannot be read (Permission denied); make it readable" in told


def test_a_folder_of_tars_says_how_to_name_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(ValueError, match=r"no class folders; give --images '.*/\*.tar'"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("b.png\tdog\n\na/ä.png\tcat\n/c.png\tdog", ("cat", "dog"), {"a/ä.png": 0, "b.png": 1}),
        ("b.png\t2\r\na.png\t10\r\n", tuple(map(str, range(11))), {"a.png": 10, "b.png": 2}),
        ("b.png\t2\na.png\t-1\n", ("-1", "2"), {"a.png": 0, "b.png": 1}),
        ("\ufeffb.png\n# a.png\n", ("images",), {"b.png": 0, "# a.png": 0}),
    ],
)
def test_text_files(tmp_path: Path, text: str, names: tuple, expected: dict) -> None:
    (tmp_path / "list.tsv").write_bytes(text.encode())
    listing = open_source(str(tmp_path / "list.tsv"))
    assert isinstance(listing, Listing)
    found = dict(zip(listing.paths, listing.labels, strict=True))
    assert listing.class_names == names
    assert {path: found[path] for path in expected} == expected
    assert listing.root == str(tmp_path)


def test_a_text_file_s_order_is_a_shuffle_of_its_own(tmp_path: Path) -> None:
    lines = [f"{i}.png\t{i % 2}" for i in range(50)]
    (tmp_path / "a").write_text("\n".join(lines))
    (tmp_path / "b").write_text("\n".join(reversed(lines)))
    a, b = read_list(tmp_path / "a"), read_list(tmp_path / "b")
    assert (a.paths, a.labels) == (b.paths, b.labels)
    assert list(a.paths) not in (sorted(a.paths), [line.split("\t")[0] for line in lines])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a.png\tcat\nb.png\n", "line 2 is not `path<TAB>class` as the first"),
        ("a.png\n\nb.png\tcat\n", "line 3 is not a path without a TAB"),
        ("a.png\tcat\tdog\n", "line 1 is not a path without a TAB"),
        ("a.png\t \n", "line 1 is not `path<TAB>class`"),
        ("a.png\t1000000\n", "1000000 is no class number"),
        ("\n", "names no images"),
        ("\x1f\x8b\0\0", "is no text file"),
    ],
)
def test_lines_of_another_form_are_told_by_number(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(ValueError, match=f"images={tmp_path}/list.*{fault}"):
        read_list(tmp_path / "list")


def test_tars_by_path_glob_braces_and_url(tmp_path: Path) -> None:
    for i in range(4):
        write_tar(tmp_path / f"x-{i:02d}.tar", [("a.png", bytes(i * 1000))])
    all_four = tuple(str(tmp_path / f"x-{i:02d}.tar") for i in range(4))
    for pattern, names in {
        f"{tmp_path}/x-02.tar": all_four[2:3],
        f"{tmp_path}/x-*.tar": all_four,
        f"{tmp_path}/x-{{00..03}}.tar": all_four,
        f"{tmp_path}/{{x-01.tar,x-00.tar}}": all_four[1::-1],
        f"file://{tmp_path}/x-{{02,00}}.tar": tuple(f"file://{all_four[i]}" for i in (2, 0)),
    }.items():
        tars = open_source(pattern)
        assert isinstance(tars, Tars) and tars.names == names
        sizes = [Path(name.removeprefix("file://")).stat().st_size for name in names]
        assert list(tars.num_bytes) == sizes


@pytest.mark.parametrize("name", ["x-{0..3}.tar", "x-*.tar", "x.tar", "nowhere"])
def test_tars_that_are_not_there_are_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"images.*{name[0]}.*(cannot be read|no such f)"):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize(
    ("suffix", "content", "names", "expected"),
    [
        ("cls", b"7\n", None, 7),
        ("cls", b"1", ("cat", "dog"), 1),
        ("cls", b"dog", ("cat", "dog"), 1),
        ("json", b'{"label": 3, "class": 4}', None, 3),
        ("json", b'{"class": "dog", "text": "a dog"}', ("cat", "dog"), 1),
        ("cls", b"dog", None, "has the label 'dog' in its cls, which is no class; .* names"),
        ("cls", b"2", ("cat", "dog"), "has the label 2, not one of 0-1"),
        ("cls", b"-1", None, "has the label '-1' in its cls"),
        ("cls", b"\xff", None, "has a cls that cannot be read"),
        ("json", b'{"label": -1}', None, "has the label -1, not one of 0-999999"),
        ("json", b'{"label": true}', None, "has the label True in its json"),
        ("json", b'{"text": "a dog"}', None, "none of the keys label, cls, class"),
        ("json", b'{"label": null}', None, "none of the keys label, cls, class"),
        ("json", b"[" * 100_000, None, "has a json that cannot be read"),
        ("cls", b"9" * 5000, None, "has the label '9+[.]+9+' in its cls"),
        ("json", b"{", None, "has a json that cannot be read"),
    ],
)
def test_labels_in_tars(tmp_path: Path, suffix: str, content: bytes, names, expected) -> None:
    good = {"cls": b"0", "json": b'{"label": 0}'}[suffix]
    members = [("a.png", png()), (f"a.{suffix}", good), ("b.png", png()), (f"b.{suffix}", content)]
    units = tar_units(write_tar(tmp_path / "x.tar", members), tmp_path, names)
    reader, item = ItemReader(units[0]), units[1].unit(0).items[1]
    if isinstance(expected, int):
        assert reader.read(item) == (png(), expected)
    else:
        with pytest.raises(Rejection, match=expected):
            reader.read(item)


def tar_units(tar: Path, work: Path, names: tuple[str, ...] | None = None):
    found = open_source(str(tar))
    assert isinstance(found, Tars)
    source = TarSource.look(found, names, work)
    return source, TarUnits(source, work)


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ([("a.json", b'{"label": 1}'), ("a.png", b""), ("a.cls", b"1")], "cls"),
        ([("a.png", b""), ("a.json", b'{"cls": 1}'), ("b.cls", b"1")], "json"),
        ([("a.png", b""), ("a.json", b'{"text": "b"}'), ("b.cls", b"1")], "cls"),
        ([("a.png", b""), ("b.png", b""), ("b.json", b'{"cls": 1}'), ("c.cls", b"1")], "json"),
        ([("a.png", b""), ("b.png", b"")], "none"),
        ([("./README", b""), (".a.cls", b""), ("d/a.png", b""), ("d/a.cls", b"1")], "cls"),
    ],
)
def test_the_first_labelled_sample_decides_how_a_set_is_labelled(
    tmp_path: Path, members: list, kind: str
) -> None:
    assert sources.label_kind(write_tar(tmp_path / "x.tar", members), "x")[0] == kind


def test_samples_of_a_tar_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    members = [
        ("d/a.png", png()),
        ("d/a.cls", b"1"),
        ("README", b""),
        ("d/b.cls", b"1"),
        ("d/c.jpg", b""),
        ("d/c.webp", b""),
        ("d/d.png", png()),
        ("d/e.seg.png", b""),
        ("d/e.PNG", png()),
        ("d/e.cls", b"2"),
        ("d/f.png", png()),
        ("d/f.cls", b"1"),
        ("d/f.png", png("blue")),
        ("d/f.cls", b"2"),
    ]
    tar = write_tar(tmp_path / "x.tar", members)
    unit = tar_units(tar, tmp_path)[1].unit(0)
    told = [(item.key, item.name, item.fault) for item in unit.items]
    assert told == [
        ("000000-0000000", f"{tar}/d/a", ""),
        ("000000-0000001", f"{tar}/d/b", "has no image (jpeg, jpg, png, webp)"),
        ("000000-0000002", f"{tar}/d/c", "has several images (jpg, webp)"),
        (
            "000000-0000003",
            f"{tar}/d/d",
            "has no label (.cls, as the first labelled sample of the set has)",
        ),
        ("000000-0000004", f"{tar}/d/e", ""),
        (
            "000000-0000005",
            f"{tar}/d/f",
            "has several members of one suffix: its name stands for more than one sample",
        ),
    ]
    assert unit.num_skipped == 1


@pytest.mark.parametrize(
    ("num_bytes", "num_whole"),
    [(2048, 2), (2048 + 476, 2), (1024 + 512 + 50, 1), (1024 + 512 + 188, 2), (100, 0)],
)
def test_a_tar_that_is_cut_short_ends_with_a_fault(
    tmp_path: Path, num_bytes: int, num_whole: int
) -> None:
    members = [(f"{i}.png", bytes(100)) for i in range(4)]  # a header, a block: 1,024 bytes each
    tar = write_tar(tmp_path / "x.tar", members)
    source, units = tar_units(tar, tmp_path)
    tar.write_bytes(tar.read_bytes()[:num_bytes])
    source = source.model_copy(update={"num_bytes": (num_bytes,)})
    items = TarUnits(source, tmp_path).unit(0).items
    assert "cut short or damaged here, and what follows is lost" in items[-1].fault
    whole = 0
    for item in items[:-1]:
        try:
            assert ItemReader(source).read(item) == (bytes(100), 0)
            whole += 1
        except Rejection as error:
            assert str(error) == "is cut short"
    assert whole == num_whole


def test_a_tar_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.png", png())])
    units = tar_units(tar, tmp_path)[1]
    write_tar(tar, [("a.png", png()), ("b.png", bytes(99999))])
    with pytest.raises(ValueError, match=r"x.tar has \d+ bytes, and had \d+ when"):
        units.unit(0)


def test_class_names_need_labels_and_each_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match="classes=.*names 'cat' twice"):
        labels.read_class_names(tmp_path / "names")
    (tmp_path / "names").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match="classes=.*empty lines"):
        labels.read_class_names(tmp_path / "names")
    tar = write_tar(tmp_path / "x.tar", [("a.png", png()), ("b.png", png())])
    with pytest.raises(ValueError, match="classes: no sample of .*x.tar has a label"):
        tar_units(tar, tmp_path, ("cat", "dog"))


def test_json_that_says_no_label_is_told_until_one_class_is_named(tmp_path: Path) -> None:
    caption = b'{"caption": "a cat"}'
    members = [("a.png", png()), ("a.json", caption), ("b.png", png()), ("b.json", caption)]
    tar = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match="x.tar has a label .*label, cls, class.*one line"):
        tar_units(tar, tmp_path)
    source, units = tar_units(tar, tmp_path, ("cats",))
    items = units.unit(0).items
    assert [ItemReader(source).read(item)[1] for item in items] == [0, 0]
    assert source.class_names == ("cats",)


def test_an_image_of_two_classes_is_told(tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("a.png\tcat\nb.png\tdog\na.png\tdog\n")
    with pytest.raises(ValueError, match="a.png is of class cat and of class dog; keep one"):
        sources.read_list(listing)
    listing.write_text("a.png\tcat\na.png\tcat\n")  # twice as often: one may want that
    assert sources.read_list(listing).paths == ("a.png", "a.png")
