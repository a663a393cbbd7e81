"""Where arrays lie in the bytes of a npy, npz or safetensors file.

An array that is stored uncompressed is contiguous bytes, so a place is all that reading it needs.
Nothing is unpickled.

Sources: numpy.lib.format (npy); PKWARE's APPNOTE 6.3 (zip's headers); the safetensors format.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

KINDS = ("npy", "npz", "safetensors")

_SAFETENSORS_DTYPES = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "U8": "|u1",
    "I8": "|i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}


class ArrayError(ValueError):
    """An array that cannot be read in place; says what it is and the remedy."""


@dataclass(frozen=True)
class Place:
    """An array in a file. `start`: the byte where its values begin, in C order.

    `dtype` is numpy's name ("<f2") where numpy has one, the file's own where not.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int


def places(kind: str, content: memoryview) -> dict[str, Place]:
    """The arrays in a file by their names; that of a npy file has the name "".

    kind: one of `KINDS`. content: the whole file.

    Raises:
        ArrayError: the file is damaged, or an array in it cannot be read in place.
    """
    try:
        if kind == "npy":
            return {"": _npy(content, 0, len(content))}
        return _npz(content) if kind == "npz" else _safetensors(content)
    except ArrayError:
        raise
    except Exception as error:  # the parsers raise a dozen kinds on broken data
        raise ArrayError(f"is not a sound {kind} file ({error})") from error


def integer(content: memoryview, place: Place) -> int:
    """The value of an array of one integer; an ArrayError if it is another."""
    if math.prod(place.shape) != 1 or place.dtype[1:2] not in ("i", "u"):
        raise ArrayError(f"is {place.dtype} of shape {place.shape}, not one integer")
    return int(np.frombuffer(content, place.dtype, 1, place.start)[0])


def _npy(content: memoryview, start: int, stop: int) -> Place:
    """The npy file that lies in content[start:stop]."""
    header = io.BytesIO(content[start : min(stop, start + 0x10010)])  # the longest of version 1
    version = np.lib.format.read_magic(header)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(header)
    else:
        raise ArrayError(f"is npy of version {version}; save it with numpy.save")
    if dtype.hasobject:
        raise ArrayError(
            "holds pickled Python objects, which could run code and are not read; save an array of "
            "numbers"
        )
    if fortran:
        raise ArrayError("is in Fortran order; save np.ascontiguousarray(array)")
    first = start + header.tell()
    num_bytes = math.prod(shape) * dtype.itemsize
    if first + num_bytes != stop:
        raise ArrayError(f"has {stop - first} bytes of values, not {num_bytes}; write it again")
    return Place(shape, dtype.str, first)


def _npz(content: memoryview) -> dict[str, Place]:
    found = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    for member in members:
        name = member.filename.removesuffix(".npy")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ArrayError(
                f"array {name} is compressed (np.savez_compressed); write it with np.savez"
            )
        # The local header has a name and extra fields of its own lengths.
        begin = member.header_offset
        if begin < 0 or bytes(content[begin : begin + 4]) != b"PK\3\4":
            raise ValueError(f"array {name} has no local header")
        start = begin + 30 + sum(struct.unpack_from("<HH", content, begin + 26))
        stop = start + member.file_size
        if zlib.crc32(content[start:stop]) != member.CRC:
            raise ArrayError(f"array {name} is damaged, its CRC differs; write it again")
        found[name] = _npy(content, start, stop)
    return found


def _safetensors(content: memoryview) -> dict[str, Place]:
    (length,) = struct.unpack_from("<Q", content)
    begin = 8 + length
    if begin > len(content):
        raise ValueError("its header is cut short")
    header = json.loads(bytes(content[8:begin]))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        start, stop = (begin + int(offset) for offset in entry["data_offsets"])
        if not begin <= start <= stop <= len(content) or not all(n >= 0 for n in shape):
            raise ValueError(f"tensor {name} lies outside of it")
        dtype = _SAFETENSORS_DTYPES.get(dtype, dtype)
        if dtype in _SAFETENSORS_DTYPES.values():
            num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
            if stop - start != num_bytes:
                raise ValueError(f"tensor {name} has {stop - start} bytes, not {num_bytes}")
        found[name] = Place(shape, dtype, start)
    return found
