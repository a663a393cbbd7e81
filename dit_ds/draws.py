"""Random numbers that belong to the sample: a stateless function of (seed, stream, epoch, id).

Nothing here remembers anything, so one, two or four ranks, any number of workers, any micro-batch
and any resume point see the same numbers, and the fate of one sample can be replayed alone.

A key (seed, stream, epoch, id, word) is hashed with the SplitMix64 finaliser. Uniforms are the
hash itself; normals come from a 256-bit hash used as the whole state of an SFC64 generator and
numpy's ziggurat. numpy's own Philox would do, but takes twice as long for a sample's normals.

Sources: Steele et al. 2014, "Fast splittable pseudorandom number generators" (the finaliser);
Doty-Humphrey, PractRand (SFC64); Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
(the idea of a counter for a state).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Stream = Literal["order", "flip", "posterior", "noise", "time", "drop", "sample"]

# The numbers are part of every run's reproducibility: add new streams, never renumber old ones.
_STREAMS: dict[str, int] = {
    "order": 1,
    "flip": 2,
    "posterior": 3,
    "noise": 4,
    "time": 5,
    "drop": 6,
    "sample": 7,
}
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(h: np.ndarray) -> np.ndarray:
    """SplitMix64 finaliser: a bijection of 64 bits in which every input bit moves every output."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _hash(seed: int, stream: Stream, epochs: np.ndarray | int, ids: np.ndarray | int) -> np.ndarray:
    """(N,) uint64 from the key, absorbed word by word. Distinct keys share no internal state."""
    h = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        for word in (seed % 2**64, _STREAMS[stream], epochs, ids):
            h = _mix((h ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
    return h


def _words(h: np.ndarray, num: int) -> np.ndarray:
    """(N, num) uint64: the first `num` outputs of SplitMix64 started at each hash."""
    with np.errstate(over="ignore"):
        return _mix(h[:, None] + np.arange(1, num + 1, dtype=np.uint64) * _GOLDEN)


def uniform(
    seed: int, stream: Stream, epochs: np.ndarray | int, ids: np.ndarray | Sequence[int]
) -> np.ndarray:
    """(N,) float32 in [0, 1), one for each id. `epochs` is one number or one for each id.

    24 bits, so that the largest value is below 1 in float32 too.
    """
    bits = _words(_hash(seed, stream, epochs, np.asarray(ids)), 1)[:, 0] >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2.0**-24)


def normal(
    seed: int,
    stream: Stream,
    epochs: np.ndarray | int,
    ids: np.ndarray | Sequence[int],
    shape: tuple[int, ...],
    out: np.ndarray | None = None,
) -> np.ndarray:
    """(N, *shape) float32 standard normals, row i from (seed, stream, epoch_i, id_i) alone."""
    ids = np.asarray(ids)
    if out is None:
        out = np.empty((len(ids), *shape), np.float32)
    states = _words(_hash(seed, stream, epochs, ids), 4)
    bits = np.random.SFC64(0)
    generator = np.random.Generator(bits)
    for row, words in zip(out, states, strict=True):
        bits.state = {
            "bit_generator": "SFC64",
            "state": {"state": words},
            "has_uint32": 0,
            "uinteger": 0,
        }
        generator.standard_normal(out=row, dtype=np.float32)
    return out


def permutation(seed: int, stream: Stream, epoch: int, key: int, n: int) -> np.ndarray:
    """(n,) int64: a permutation of range(n) that depends on (seed, stream, epoch, key) alone."""
    words = _words(_hash(seed, stream, epoch, np.asarray([key])), n)[0]
    return np.argsort(words, kind="stable")
