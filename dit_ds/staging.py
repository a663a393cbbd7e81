"""Tensors waiting in host memory to become a safetensors file, written while training goes on.

The buffer holds the bytes of the file, header and all, so that nothing is left to do but copy in,
write and checksum. The layout is that of https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path

import torch

from dit_ds import distributed, files
from dit_ds.archive import chunks_of
from dit_ds.checkpoint_index import File
from dit_ds.parallel import in_background

_HASHERS = 2


class Staging:
    """A file's bytes in host memory, allocated once: float32 vectors by name.

    Args:
        sizes: number of values of each.
        memory: another one, whose memory this takes over as far as it goes.
    """

    def __init__(self, sizes: dict[str, int], memory: Staging | None = None) -> None:
        self.sizes = sizes
        tree, at = {}, 0
        for name, size in sizes.items():
            tree[name] = {"dtype": "F32", "shape": [size], "data_offsets": [at, at + 4 * size]}
            at += 4 * size
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # values are aligned
        header = len(text).to_bytes(8, "little") + text
        num_bytes = len(header) + at
        self._memory: torch.Tensor
        if memory is not None and memory._memory.numel() >= num_bytes:
            self._memory = memory._memory
        else:
            self._memory = distributed.host_buffer(num_bytes)
        self._buffer = self._memory[:num_bytes]
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        values = self._buffer[len(header) :].view(torch.float32)
        self._vectors = dict(zip(sizes, values.split(list(sizes.values())), strict=True))

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._buffer.numel()

    def copy(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take in new values, float32 and 1-D, and wait until they are here."""
        assert tensors.keys() == self._vectors.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32, (name, tensor.dtype)
            self._vectors[name].copy_(tensor, non_blocking=True)
        distributed.synchronize()

    def write(self, path: Path) -> File:
        """Write the file; see `write`."""
        return write(self._buffer.numpy().data, path)


def write(data: memoryview, path: Path) -> File:
    """Write a new file and wait until it is on the disk; checksums are made meanwhile.

    Raises:
        OSError: it cannot be written, or its folder is not seen from this host.
    """
    files.seen(path.parent.is_dir)  # if it is not, opening says so
    chunks = chunks_of(data)
    # Threads that an exit does not wait for, as it would for those of a pool.
    hashers = [
        in_background(functools.partial(_digests, chunks[i::_HASHERS])) for i in range(_HASHERS)
    ]
    try:
        with open(path, "xb", buffering=0) as file:
            for chunk in chunks:
                while chunk:
                    chunk = chunk[file.write(chunk) :]
                _let_go(file.fileno())
            os.fsync(file.fileno())
            _let_go(file.fileno())
    except OSError as error:
        error.filename = str(path)  # a full disk would not say which
        raise
    digests = [""] * len(chunks)
    for i, hasher in enumerate(hashers):
        digests[i::_HASHERS] = hasher.result()
    return File(num_bytes=len(data), sha256=digests)


def _let_go(descriptor: int) -> None:
    """Have the disk begin now, and leave the memory to what training reads."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _digests(chunks: list[memoryview]) -> list[str]:
    return [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
