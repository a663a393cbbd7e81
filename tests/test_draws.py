"""Draws are a pure function of (seed, stream, epoch, id), pinned for ever, and well distributed."""

from __future__ import annotations

import hashlib
from typing import get_args

import numpy as np
import pytest

from dit_ds import draws

STREAMS: tuple[draws.Stream, ...] = get_args(draws.Stream)


def test_stored_hash_pins_the_numbers() -> None:
    # A change here changes every run in the world: a resume would go on with other noise.
    ids = np.array([0, 1, 2**40])
    digest = hashlib.sha256()
    for stream in STREAMS[:7]:  # later streams come after these
        digest.update(draws.uniform(7, stream, 3, ids).tobytes())
        digest.update(draws.normal(7, stream, 3, ids, (4, 5)).tobytes())
    digest.update(draws.permutation(7, "order", 3, 5, 100).tobytes())
    assert digest.hexdigest() == "bfcc787a1572229145780c531da50df2e5f3d75d4f0c40fdc3de421eefd7f239"


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


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_is_one(n: int) -> None:
    assert sorted(draws.permutation(0, "order", 1, 2, n)) == list(range(n))
