"""Power-function averages of the weights: their profiles over time, and sums of these profiles.

An average with exponent gamma weighs the weights of time tau, at time t, by the profile
(gamma + 1) / t^(gamma + 1) * tau^gamma on (0, t]. Its length sigma_rel is the profile's standard
deviation over t. As inner products of profiles have a closed form, the average of any length is
found afterwards as the sum of a few stored ones whose profiles add up to its own. No torch here.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3 and appendix C.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LONGEST = 12**-0.5
"""The length of the plain mean (gamma = 0); the profiles of longer ones would fall with time."""


class Profile(NamedTuple):
    """Of the average with exponent `gamma` at `time`, in optimizer steps."""

    time: float
    gamma: float


def exponent(length: float) -> float:
    """The gamma of a length: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    length: in (0, LONGEST]. Source: Karras et al. 2024, section 3.1.
    """
    assert 0 < length <= LONGEST
    s = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


def length(gamma: float) -> float:
    """The length of an exponent, the inverse of `exponent`."""
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


def inner_products(a: list[Profile], b: list[Profile]) -> np.ndarray:
    """Integrals of p_i q_j over time, (len(a), len(b)), float64.

    Source: Karras et al. 2024, appendix C: with t the earlier time, t^(gamma_i + gamma_j + 1) over
    that exponent; here as a power of the ratio of times, which cannot overflow.
    """
    (t, g), (u, h) = np.array(a).T[:, :, None], np.array(b).T[:, None, :]
    ratio = np.where(t < u, (t / u) ** h, (u / t) ** g)
    return (g + 1) * (h + 1) / (g + h + 1) * ratio / np.maximum(t, u)


def combination(stored: list[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The weights (len(stored),) of the sum nearest to a profile, and the distance that is left.

    Nearest in the least-squares sense, among sums whose weights add up to 1, as those of averages
    must: what does not change in a training comes out as it is. The distance is relative to the
    profile's norm: 0 is exact, 1 is no better than nothing. Source: Karras et al. 2024, appendix C.
    """
    gram, target = inner_products(stored, stored), inner_products(stored, [wanted])[:, 0]
    square = inner_products([wanted], [wanted])[0, 0]
    n = len(stored)
    system = np.zeros((n + 1, n + 1))  # the last unknown is the multiplier of the sum
    system[:n, :n] = gram / square
    system[:n, n] = system[n, :n] = 1
    weights = np.linalg.solve(system, np.append(target / square, 1))[:n]
    left = weights @ gram @ weights - 2 * weights @ target + square
    return weights, float(np.sqrt(max(left, 0.0) / square))
