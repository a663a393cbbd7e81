"""Draws are a pure function of (seed, stream, epoch, id), pinned for ever, and well distributed."""

from __future__ import annotations

import hashlib
import math
from typing import get_args

import numpy as np
import pytest

from dit_ds import draws

STREAMS: tuple[draws.Stream, ...] = get_args(draws.Stream)


def test_stored_hash_pins_the_numbers() -> None:
    # A change here changes every run in the world: a resume would go on with other noise.
    ids = np.array([0, 1, 2**40])
    digest = hashlib.sha256()
    for stream in STREAMS[:10]:  # later streams come after these
        digest.update(draws.uniform(7, stream, 3, ids).tobytes())
        digest.update(draws.normal(7, stream, 3, ids, (4, 5)).tobytes())
    size, key = np.full(100, 100), np.full(100, 5)
    digest.update(draws.permuted(7, "order", 3, key, size, np.arange(100)).tobytes())
    assert digest.hexdigest() == "ea3ae172f186d63e17b466b95b4f2840f69642eac96812cf244aff3afd83112d"


def test_a_sample_is_drawn_alone_as_in_any_company() -> None:
    ids, epochs = np.array([5, 9, 2]), np.array([0, 1, 7])
    together = draws.normal(1, "noise", epochs, ids, (2, 3))
    for i in range(3):
        alone = draws.normal(1, "noise", int(epochs[i]), ids[i : i + 1], (2, 3))
        assert np.array_equal(together[i], alone[0])
        u = draws.uniform(1, "time", int(epochs[i]), ids[i : i + 1])
        assert draws.uniform(1, "time", epochs, ids)[i] == u[0]


def test_seeds_streams_epochs_and_ids_share_nothing() -> None:
    rows = [
        draws.normal(seed, stream, epoch, [i], (4,))[0]
        for seed in (0, 1, -1)
        for stream in STREAMS
        for epoch in (0, 1)
        for i in (0, 1)
    ]
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_distributions() -> None:
    u = draws.uniform(0, "time", 0, np.arange(200_000))
    assert u.min() >= 0 and u.max() < 1
    # Kolmogorov-Smirnov at 1e-6: 2.63 / sqrt(n).
    steps = np.arange(len(u)) / len(u)
    assert np.abs(np.sort(u) - steps).max() < 2.7 / np.sqrt(len(u))
    z = draws.normal(0, "noise", 0, np.arange(500), (400,))
    n = z.size
    assert abs(z.mean()) < 5 / np.sqrt(n) and abs(z.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
    # Neighbouring samples, neighbouring values and neighbouring epochs are uncorrelated.
    other = draws.normal(0, "noise", 1, np.arange(500), (400,))
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z, other)):
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size)


def test_normals_agree_with_float64() -> None:
    words = draws._words(draws._hash(3, "noise", 0, np.arange(400)), 500)
    bits = words.view(np.uint32)
    # What is drawn are 31 bits rounded to float32.
    u = ((bits[:, :500] // 2).astype(np.float32) + np.float32(0.5)) / 2.0**31
    u = u.astype(np.float64)
    f = bits[:, 500:].view(np.int32) * (np.pi / 2**32)
    r = np.sqrt(-2 * np.log(u))
    sign = 1 - 2.0 * (bits[:, :500] & 1)
    expected = np.concatenate([r * np.sin(f), sign * r * np.cos(f)], axis=1)
    found = draws.normal(3, "noise", 0, np.arange(400), (1000,))
    # a few roundings of float32, at values up to 6
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_extreme_bits_make_finite_normals() -> None:
    corners = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    words = np.array([[(b << 32) | a for a in corners] for b in corners], np.uint64)
    z = draws._box_muller(words)
    assert np.isfinite(z).all() and np.abs(z).max() < 6.67


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 1000, 12_345])
def test_permuted_is_a_permutation(n: int) -> None:
    for key in range(3):
        found = draws.permuted(0, "order", 1, np.full(n, key), np.full(n, n), np.arange(n))
        assert sorted(found) == list(range(n))


def test_a_place_in_a_permutation_is_found_alone() -> None:
    sizes = np.array([10**9, 3, 10**9, 777])
    keys, indices = np.array([0, 1, 0, -5]), np.array([123_456_789, 2, 5, 776])
    together = draws.permuted(1, "order", 2, keys, sizes, indices)
    assert (together < sizes).all() and (together >= 0).all()
    for i in range(4):
        one = slice(i, i + 1)
        alone = draws.permuted(1, "order", 2, keys[one], sizes[one], indices[one])
        assert alone[0] == together[i]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_come_equally_often(n: int) -> None:
    num = 6000
    keys, indices = np.repeat(np.arange(num), n), np.tile(np.arange(n), num)
    found = draws.permuted(0, "order", 0, keys, np.full(n * num, n), indices).reshape(num, n)
    _, counts = np.unique(found, axis=0, return_counts=True)
    kinds = math.factorial(n)
    assert len(counts) == kinds
    chi_square = ((counts - num / kinds) ** 2 / (num / kinds)).sum()
    # mean kinds - 1, variance twice that; 5 standard deviations
    assert chi_square < kinds - 1 + 5 * math.sqrt(2 * (kinds - 1))


def test_permutations_mix_near_and_far() -> None:
    n = 50_000
    found = draws.permuted(0, "order", 0, np.zeros(n, int), np.full(n, n), np.arange(n))
    for lag in (1, 2, 223, 224, 225):  # 224 is the base of the two digits
        steps = (found[lag:] - found[:-lag]) % n
        counts = np.bincount(steps * 100 // n, minlength=100)
        expected = len(steps) / 100
        assert ((counts - expected) ** 2 / expected).sum() < 99 + 5 * math.sqrt(198)
