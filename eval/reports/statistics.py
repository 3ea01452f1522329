"""Tests and fits that tables of runs need, beside the intervals of `eval.benchmarks.intervals`.

numpy alone: each is a few lines, and a library's own would still have to be told of pairs, of
images, and of ratios of sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.benchmarks.intervals import Numbers, Ratios, ratio

NORMAL_95 = 1.959964
POWER_80 = 0.841621
"""Quantiles of the normal distribution: two-sided 5 %, and 80 % power."""
CHI2_95 = -2 * math.log(0.05)
"""Of two degrees of freedom."""


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for how many there are (Holm 1979): the smallest times n, the next
    times n - 1, and so on, none below one before it.
    """
    found, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        found[index] = least
    return found


def permutation_test(
    before: Mapping[str, Numbers],
    after: Mapping[str, Numbers],
    ratios: Ratios,
    draws: int = 9999,
    seed: int = 0,
) -> dict[str, float]:
    """Two-sided p-values of the paired permutation test, by measure: how often, if the two runs are
    exchanged on some of the samples, they differ as much as they do. counts `{name: [samples]}`.

    Every exchange is tried where there are at most `draws` of them, else so many drawn ones.
    """
    one, two = (np.stack([*counts.values()], 1).astype(float) for counts in (before, after))
    middle, half = (one + two).sum(0) / 2, (two - one) / 2
    signs = np.vstack([np.ones((1, len(one))), _signs(len(one), draws, seed)])
    moved = signs @ half

    def measured(sums: Numbers) -> dict[str, Numbers]:
        found = ratios(dict(zip(before, sums.T, strict=True)))
        return {name: ratio(*parts) for name, parts in found.items()}

    firsts, seconds = measured(middle - moved), measured(middle + moved)
    found = {}
    for name, first in firsts.items():
        apart = np.abs(seconds[name] - first)
        # the first one is what was seen; exact equality would hang on rounding
        found[name] = float((apart >= apart[0] - 1e-12)[_counted(len(one), draws) :].mean())
    return found


def _signs(samples: int, draws: int, seed: int) -> Numbers:
    if samples < 64 and 2**samples <= draws:
        patterns = np.arange(2**samples)[:, None] >> np.arange(samples) & 1
        return np.asarray(1.0 - 2 * patterns)
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, samples))


def _counted(samples: int, draws: int) -> int:
    """Whether what was seen is among all exchanges already (1), or counts as one more (0)."""
    return int(samples < 64 and 2**samples <= draws)


@dataclass(frozen=True)
class Fit:
    """Coefficients `[p]` of a regression, and their covariance `[p, p]`."""

    coefficients: Numbers
    covariance: Numbers

    def combine(self, weights: Sequence[float] | Numbers) -> tuple[float, float]:
        """A linear combination of the coefficients, and its standard error."""
        row = np.asarray(weights, dtype=float)
        variance = float(row @ self.covariance @ row)
        return float(row @ self.coefficients), math.sqrt(max(0.0, variance))


def poisson(x: Numbers, y: Numbers, exposure: Numbers, groups: Numbers) -> Fit:
    """Poisson regression, log E[y] = log exposure + x beta, by reweighted least squares; the
    covariance holds for counts that vary more than Poisson's, and together within a group.

    x `[n, p]`, y, exposure, groups `[n]`.
    """
    beta = np.linalg.lstsq(x, np.log((y + 0.5) / (exposure + 0.5)), rcond=None)[0]
    for _ in range(50):
        expected = exposure * np.exp(np.clip(x @ beta, -30, 30))
        information = np.linalg.pinv(x.T @ (expected[:, None] * x))
        step = information @ (x.T @ (y - expected))
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            break
    expected = exposure * np.exp(np.clip(x @ beta, -30, 30))
    information = np.linalg.pinv(x.T @ (expected[:, None] * x))
    index = np.unique(groups, return_inverse=True)[1]
    scores = np.zeros((index.max() + 1, x.shape[1]))
    np.add.at(scores, index, (y - expected)[:, None] * x)
    return Fit(np.asarray(beta, dtype=float), information @ (scores.T @ scores) @ information)


@dataclass(frozen=True)
class Ellipse:
    """The 95 % region of points in a plane, were they normal.

    width, height: whole axes, the longer first. angle: of that, in degrees against the x axis.
    """

    center: tuple[float, float]
    width: float
    height: float
    angle: float


def ellipse(across: Numbers, up: Numbers) -> Ellipse:
    """The ellipse of resampled pairs of measures, `[draws]` each."""
    values, vectors = np.linalg.eigh(np.cov(across, up))
    axes = 2 * np.sqrt(CHI2_95 * values.clip(0))
    angle = math.degrees(math.atan2(vectors[1, 1], vectors[0, 1])) % 180
    center = float(across.mean()), float(up.mean())
    return Ellipse(center, float(axes[1]), float(axes[0]), angle)


def smallest_difference(draws: Numbers) -> float:
    """The smallest true difference that a test at 5 % would have found four times in five, from
    resampled differences `[draws]`.
    """
    return float((NORMAL_95 + POWER_80) * draws.std(ddof=1))
