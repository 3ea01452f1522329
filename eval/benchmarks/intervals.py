"""Seeded bootstrap intervals of ratios of counts.

Samples (captions, or the images of questions) are drawn with replacement, their counts summed, and
the measure taken of the sums: the percentile bootstrap of Efron and Tibshirani, chapter 13.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.float64]
# counts by name, to (numerator, denominator) by name of the measure
Ratios: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, tuple[Any, Any]]]

DRAWS = 2000
_CELLS = 4_000_000


def ratio(numerator: Any, denominator: Any) -> Numbers:
    """Element-wise quotient, with 0 wherever the denominator is 0."""
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.asarray(denominator, dtype=np.float64)
    return np.divide(top, bottom, out=np.zeros(np.broadcast(top, bottom).shape), where=bottom != 0)


def resample(rows: Numbers, n: int = DRAWS, seed: int = 0) -> Numbers:
    """Sums `[n, columns]` of the rows `[samples, columns]` drawn n times with replacement."""
    samples = len(rows)
    generator = np.random.default_rng(seed)
    sums = np.empty((n, rows.shape[1]))
    chunk = max(1, _CELLS // samples)
    for start in range(0, n, chunk):
        draws = min(chunk, n - start)
        picks = generator.integers(samples, size=(draws, samples))
        picks += np.arange(draws)[:, None] * samples
        times = np.bincount(picks.ravel(), minlength=draws * samples).reshape(draws, samples)
        sums[start : start + draws] = times @ rows
    return sums


def interval(values: Numbers, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of resampled values."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def measure(counts: Mapping[str, Numbers], ratios: Ratios, seed: int = 0) -> dict[str, Any]:
    """Values, 95 % intervals and undefined measures of per-sample counts `{name: [samples]}`.

    A measure with denominator 0 is 0 and is listed under "undefined".
    """
    rows = np.stack([np.asarray(column, dtype=np.float64) for column in counts.values()], axis=1)
    totals = ratios(dict(zip(counts, rows.sum(axis=0), strict=True)))
    draws = ratios(dict(zip(counts, resample(rows, seed=seed).T, strict=True)))
    return {
        "values": {name: float(ratio(*parts)) for name, parts in totals.items()},
        "intervals": {name: list(interval(ratio(*parts))) for name, parts in draws.items()},
        "undefined": [name for name, (_, bottom) in totals.items() if bottom == 0],
    }


def grouped(counts: Mapping[str, Numbers], groups: Sequence[str] | None) -> Mapping[str, Numbers]:
    """Counts `{name: [samples]}` summed over the samples of each group, `[groups]` by name.

    What is asked about one image stands or falls together, so it is drawn together.
    """
    if groups is None:
        return counts
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return {
        name: np.bincount(index, weights=column).astype(np.float64)
        for name, column in counts.items()
    }


@dataclass(frozen=True)
class Tally:
    """Counts with the measures that are taken of their sums.

    counts: `{name: [samples]}`
    ratios: numerator and denominator of each measure, of the sums
    right: `[questions]`, 1 where an answer is right, else 0; for questions with two answers
    """

    counts: Mapping[str, Numbers]
    ratios: Ratios
    right: Numbers | None = None

    def report(self, seed: int = 0) -> dict[str, Any]:
        """Values, the sums behind them, 95 % intervals, and the number of samples."""
        measured = measure(self.counts, self.ratios, seed)
        return {
            **measured["values"],
            "counts": {name: int(column.sum()) for name, column in self.counts.items()},
            "intervals": measured["intervals"],
            "n": len(next(iter(self.counts.values()))),
        }


def paired(
    before: Mapping[str, Numbers], after: Mapping[str, Numbers], ratios: Ratios, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """What changed between two sets of counts `{name: [samples]}` of the same samples.

    By measure: the two values, their difference, and its 95 % interval; each draw of samples gives
    one difference.
    """
    rows = np.stack([*before.values(), *after.values()], axis=1).astype(np.float64)
    names, half = list(before), len(before)

    def both(sums: Numbers) -> list[dict[str, Numbers]]:
        parts = (sums[..., :half], sums[..., half:])
        results = (ratios(dict(zip(names, np.moveaxis(p, -1, 0), strict=True))) for p in parts)
        return [{name: ratio(*pair) for name, pair in one.items()} for one in results]

    values, draws = both(rows.sum(axis=0)), both(resample(rows, seed=seed))
    return {
        name: {
            "before": float(values[0][name]),
            "after": float(values[1][name]),
            "difference": float(values[1][name] - values[0][name]),
            "interval": list(interval(draws[1][name] - draws[0][name])),
        }
        for name in values[0]
    }
