"""Keys, labels and class names, for images and for latents that others wrote, as webdataset has it.

A sample's label is a member `KEY.cls`, or stands in `KEY.json` under one of `LABEL_KEYS`: a class
number, or the name of a class where the user gave the names.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

UNLABELLED: tuple[str, ...] = ("images",)
"""The class names of a set without classes."""
MAX_CLASSES = 1_000_000
"""A number from here on is a mistake, not a class: it would take so many class names."""
LABEL_KEYS = ("label", "cls", "class")
"""Where the JSON beside the data may say its class; the first that is there counts."""
LabelKind = Literal["cls", "json", "none"]
"""What labels the samples of tars: members `KEY.cls`, members `KEY.json`, or nothing."""


def split_name(member: str) -> tuple[str, str]:
    """A member's sample and suffix as webdataset splits them: `a/b.C.jpg` is `a/b` and `c.jpg`.

    Both are empty where it is none: no suffix, or nothing before it.
    """
    folder, slash, name = member.rpartition("/")
    key, _, suffix = name.partition(".")
    return (folder + slash + key, suffix.lower()) if key and suffix else ("", "")


def read_class_names(file: str | Path) -> tuple[str, ...]:
    """The class names in a text file, one on each line, the first of them class 0."""
    try:
        names = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"classes={file}: cannot be read: {error}") from error
    if not names or not all(name.strip() for name in names):
        raise ValueError(f"classes={file}: holds empty lines; write one class name on each")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"classes={file}: names {twice!r} twice; give each class its own name")
    return tuple(names)


def class_ids(names: Sequence[str] | None) -> dict[str, int] | None:
    """The class number of each name; None where the labels themselves are the names."""
    return None if names is None else {name: number for number, name in enumerate(names)}


def says_label(content: bytes) -> bool:
    """Whether a `KEY.json` says a label under one of `LABEL_KEYS`."""
    try:
        return _stated(content, "json") is not None
    except ValueError:
        return False


def _stated(content: bytes, kind: LabelKind) -> object | None:
    """What a `cls` or `json` says is the label; None if a json says none."""
    try:
        if kind == "cls":
            return content.decode().strip()
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a {kind} that cannot be read: {error}") from error
    tree = found if isinstance(found, dict) else {}
    return next((tree[key] for key in LABEL_KEYS if key in tree), None)


def parse_label(content: bytes, kind: LabelKind, ids: Mapping[str, int] | None) -> int | None:
    """The class number that a `cls` or `json` says; None if a json says none. ids: see `class_ids`.

    Raises:
        ValueError: it says one that is none; a phrase to stand behind the sample's name.
    """
    value = _stated(content, kind)
    if value is None:
        return None
    number = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        if value.isascii() and value.isdigit() and len(value) < 20:
            number = int(value)
        elif ids is not None:
            number = ids.get(value)
    if number is None:
        raise ValueError(
            f"has the label {reprlib.repr(value)} in its {kind}, which is no class; write a class "
            "number, or give the class names (--classes)"
        )
    return checked_label(number, ids)


def checked_label(number: int, ids: Mapping[str, int] | None) -> int:
    """The class number, if there is such a class. Raises a ValueError as `parse_label` does."""
    num_classes = MAX_CLASSES if ids is None else len(ids)
    if not 0 <= number < num_classes:
        raise ValueError(f"has the label {number}, not one of 0-{num_classes - 1}")
    return number
