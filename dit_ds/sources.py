"""Which images there are: class folders, a text file of paths, or tars of images.

`open_source` looks at what the user named. Folders and text files are listed once, by one rank, in
an order shuffled by a hash of the paths, so that each shard mixes classes and every machine has the
same order. Tars, which may be terabytes away, are taken in the order of their names and never
listed inside.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dit_ds import remote, transfer
from dit_ds.labels import MAX_CLASSES, UNLABELLED, LabelKind, says_label, split_name

IMAGE_SUFFIXES = frozenset(
    ".bmp .gif .jfif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()  # compared in lower case
)


class Listing(NamedTuple):
    """Labelled image files. `labels[i]` is the place of `paths[i]`'s class in `class_names`."""

    root: str
    """What relative paths are relative to."""
    class_names: tuple[str, ...]
    paths: Sequence[str]
    labels: Sequence[int]
    num_skipped: int
    """Files that are not images by their suffix."""


class Tars(NamedTuple):
    """Tars of images, as webdataset knows them."""

    names: tuple[str, ...]
    """Paths or URLs."""
    num_bytes: tuple[int, ...]


def open_source(images: str) -> Listing | Tars:
    """What `images` names: a folder, a text file, or tars by a path, pattern or URL.

    Raises:
        ValueError: it names nothing, or what is there cannot be taken as it is.
    """
    if os.path.isfile(images) and not images.endswith(".tar"):
        return read_list(images)
    pattern = images.endswith(".tar") or "{" in images or glob.has_magic(images)
    if remote.is_url(images) or (pattern and not os.path.isdir(images)):
        return find_tars(images)
    return list_class_folders(images)


# Folders


def list_class_folders(root: str | Path) -> Listing:
    """The images below `root`, where each folder in `root` is a class.

    Classes are numbered in the order of their names. Images may lie deeper in their class folder.
    A folder that holds images and no folders is a set without classes.

    Raises:
        ValueError: no such folder, no images, images beside class folders, an empty class.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"images={root}: no such folder or file; give a folder of class folders, a text file "
            "of `path<TAB>class`, or .tar files"
        )
    entries = sorted(e for e in root.iterdir() if not e.name.startswith("."))
    folders = [e for e in entries if e.is_dir()]
    stray = [e.name for e in entries if not e.is_dir()]
    stray_images = [name for name in stray if _is_image(name)]
    if not folders and stray_images:
        num_skipped = len(stray) - len(stray_images)
        return _shuffled(root, UNLABELLED, [(name, 0) for name in stray_images], num_skipped)
    if stray_images:
        raise ValueError(
            f"images={root}: {len(stray_images)} images (first: {stray_images[0]}) lie outside of "
            "class folders; give a folder with one folder for each class, or, for images without "
            "classes, one that holds no folders"
        )
    if not folders:
        tars = [name for name in stray if name.endswith(".tar")]
        remedy = f"give --images '{root}/*.tar'" if tars else "put the images of each in one"
        raise ValueError(f"images={root}: holds no class folders; {remedy}")
    found: list[tuple[str, int]] = []
    num_skipped, empty = len(stray), []
    for label, folder in enumerate(folders):
        files = list(_files_below(str(folder)))
        images = [os.path.relpath(file, root) for file in files if _is_image(file)]
        num_skipped += len(files) - len(images)
        found += [(image, label) for image in images]
        if not images:
            empty.append(folder.name)
    if empty:
        raise ValueError(
            f"images={root}: {len(empty)} of {len(folders)} class folders hold no images (first: "
            f"{empty[0]}); fill or remove them (known are {' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return _shuffled(root, tuple(f.name for f in folders), found, num_skipped)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _files_below(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in a folder and in those below it, through links. above: the folders it lies in."""
    above = (*above, os.path.realpath(folder))
    if above[-1] in above[:-1]:
        raise ValueError(f"images: {folder} links to a folder that it lies in; remove the link")
    try:
        with os.scandir(folder) as entries:
            found = [(e.path, e.is_dir()) for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise ValueError(
            f"images: {error.filename} cannot be read ({error.strerror}); make it readable, or "
            "remove it"
        ) from error
    for path, is_folder in found:
        yield from _files_below(path, above) if is_folder else (path,)


def _shuffled(
    root: str | Path, class_names: tuple[str, ...], found: list[tuple[str, int]], num_skipped: int
) -> Listing:
    found.sort(key=lambda item: (hashlib.sha256(os.fsencode(item[0])).digest(), item[1]))
    paths, labels = zip(*found, strict=True)
    return Listing(os.path.abspath(root), class_names, paths, labels, num_skipped)


# A text file


def read_list(file: str | Path) -> Listing:
    """The images that a text file names, one on each line: `path<TAB>class`, or `path` alone.

    Paths are absolute or relative to the file's folder. Classes are any text, numbered in the order
    of their names; where all are whole numbers, they are the numbers, from 0 to the largest.
    Without a TAB on any line it is a set without classes. Blank lines hold nothing; any other line
    counts. (UTF-8; paths may hold other bytes.)

    Raises:
        ValueError: a line that is not of the form of the others, by its number.
    """
    found: list[tuple[str, str]] = []
    labelled = False
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if "\0" in line:
                raise ValueError(f"images={file}: is no text file of `path<TAB>class`, nor a .tar")
            fields = line.rstrip("\n").split("\t")
            if fields == [""]:
                continue
            if not found:
                labelled = len(fields) == 2
            if len(fields) != 1 + labelled or not all(field.strip() for field in fields):
                form = "`path<TAB>class`" if labelled else "a path without a TAB"
                raise ValueError(
                    f"images={file}: line {number} is not {form} as the first line is; correct it"
                )
            found.append((fields[0], fields[-1]))
    if not found:
        raise ValueError(f"images={file}: names no images; write a line `path<TAB>class` for each")
    first: dict[str, str] = {}
    for path, name in found:
        if first.setdefault(path, name) != name:
            raise ValueError(
                f"images={file}: {path} is of class {first[path]} and of class {name}; keep one"
            )
    root = Path(file).absolute().parent
    if not labelled:
        return _shuffled(root, UNLABELLED, [(path, 0) for path, _ in found], num_skipped=0)
    names, labels = _number_classes({name for _, name in found}, f"images={file}")
    return _shuffled(root, names, [(path, labels[name]) for path, name in found], num_skipped=0)


def _number_classes(names: set[str], where: str) -> tuple[tuple[str, ...], dict[str, int]]:
    if all(name.isascii() and name.isdigit() for name in names):
        labels = {name: int(name) for name in names}
        if max(labels.values()) >= MAX_CLASSES:
            raise ValueError(
                f"{where}: {max(labels.values())} is no class number; number classes from 0 on, "
                "without gaps, or give them names"
            )
        return tuple(str(i) for i in range(max(labels.values()) + 1)), labels
    ordered = tuple(sorted(names))
    return ordered, {name: i for i, name in enumerate(ordered)}


# Tars


def find_tars(images: str) -> Tars:
    """The tars that a path, a glob pattern, a brace pattern (`{0000..0099}`) or a URL names.

    Raises:
        ValueError: there are none, one is missing, or a URL's server does not tell its size.
    """
    from webdataset.shardlists import expand_urls

    names: list[str] = []
    for name in expand_urls(images):
        if remote.is_url(name):
            names.append(name)
        else:
            names += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    if not names:
        raise ValueError(f"images={images}: no such file; give tars by a path, a pattern or a URL")
    wrong = [name for name in names if not remote.is_url(name) and not name.endswith(".tar")]
    if wrong:
        raise ValueError(f"images={images}: {wrong[0]} is no .tar (unpack .gz and the like first)")
    names = [name if remote.is_url(name) else os.path.abspath(name) for name in names]
    with ThreadPoolExecutor(32) as pool:  # a URL's size takes a round trip
        return Tars(tuple(names), tuple(pool.map(size_of, names)))


def size_of(name: str) -> int:
    """Bytes of a file at a path or URL; a ValueError that names it if it cannot be told."""
    try:
        size = transfer.remote_size(name) if remote.is_url(name) else os.stat(name).st_size
    except OSError as error:
        raise ValueError(f"images: {name} cannot be read ({error.strerror})") from error
    if size is None:
        raise ValueError(f"images: {name}: its server does not tell its size; copy it to a disk")
    return size


def label_kind(tar: str | Path, name: str) -> tuple[LabelKind, bool]:
    """What labels the images of a set, decided by the first labelled sample of its first tar.

    Where none is, the second tells whether there are `json` that say no label.
    """
    found: set[str] = set()
    sample, has_json = "", False
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                key, suffix = split_name(member.name)
                if not member.isfile() or not key:
                    continue
                if key != sample and found:
                    break
                sample = key
                content = file.extractfile(member) if suffix in ("cls", "json") else None
                has_json |= suffix == "json"
                if content and (suffix == "cls" or says_label(content.read())):
                    found.add(suffix)
    except (OSError, tarfile.TarError) as error:
        if isinstance(error, OSError) or not sample:  # the good part of a damaged tar will do
            raise ValueError(f"images: {name} cannot be read as a tar: {error}") from error
    if not sample:
        raise ValueError(f"images: {name}, the first tar, is empty; leave it out")
    return "cls" if "cls" in found else "json" if "json" in found else "none", has_json
