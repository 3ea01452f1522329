"""Bootstrap intervals of summed counts."""

from collections.abc import Callable

import numpy as np
import pytest

from eval.benchmarks.intervals import (
    DRAWS,
    Numbers,
    grouped,
    interval,
    measure,
    ratio,
    resample,
)


def bootstrap(
    rows: Numbers, statistic: Callable[[Numbers], Numbers], n: int = DRAWS
) -> tuple[float, float]:
    return interval(statistic(resample(rows, n)))


def quotient(sums: Numbers) -> Numbers:
    return ratio(sums[..., 0], sums[..., 1])


def test_ratio_is_zero_where_nothing_divides() -> None:
    assert ratio(np.array([1, 3, 0]), np.array([2, 0, 0])).tolist() == [0.5, 0.0, 0.0]
    assert float(ratio(3, 4)) == 0.75
    assert float(ratio(3, 0)) == 0.0


def test_sums_are_sums_of_drawn_rows() -> None:
    rows = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    sums = resample(rows, n=500, seed=3)
    assert sums.shape == (500, 2)
    np.testing.assert_array_equal(sums[:, 1], 10 * sums[:, 0])
    # three draws with replacement from {1, 2, 4}
    possible = {a + b + c for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4)}
    assert set(sums[:, 0]) == possible
    assert abs(sums[:, 0].mean() - 7) < 0.3


def test_the_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(12.0).reshape(6, 2)
    whole = resample(rows, n=50, seed=1)
    np.testing.assert_array_equal(whole, resample(rows, n=50, seed=1))
    assert not np.array_equal(whole, resample(rows, n=50, seed=2))
    monkeypatch.setattr("eval.benchmarks.intervals._CELLS", 42)
    np.testing.assert_array_equal(whole, resample(rows, n=50, seed=1))


def test_interval_are_the_percentiles() -> None:
    assert interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert interval(np.arange(1001.0), level=0.5) == pytest.approx((250.0, 750.0))


def test_a_share_gets_the_width_that_theory_gives() -> None:
    hits = np.repeat([1.0, 0.0], [300, 700])
    low, high = bootstrap(np.stack([hits, np.ones(1000)], axis=1), quotient, n=4000)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert abs(low - (0.3 - half)) < 0.004
    assert abs(high - (0.3 + half)) < 0.004


def test_identical_samples_leave_no_doubt() -> None:
    assert bootstrap(np.tile([1.0, 4.0], (20, 1)), quotient) == (0.25, 0.25)


def test_a_paired_difference_is_narrower_than_either_side() -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 2, 400).astype(float)
    second = np.where(np.arange(400) < 20, 1 - first, first)
    rows = np.stack([first, second, np.ones(400)], axis=1)
    low, high = bootstrap(rows, lambda s: ratio(s[..., 0] - s[..., 1], s[..., 2]))
    alone = bootstrap(rows, lambda s: ratio(s[..., 0], s[..., 2]))
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_measure_gives_values_intervals_and_what_is_undefined() -> None:
    counts = {"hits": np.array([1.0, 0.0, 1.0]), "tries": np.array([2.0, 2.0, 4.0])}
    measured = measure(
        counts, lambda c: {"rate": (c["hits"], c["tries"]), "none": (c["hits"], 0 * c["tries"])}
    )
    assert measured["values"] == {"rate": 0.25, "none": 0.0}
    assert measured["undefined"] == ["none"]
    # draws of one row only give the extremes 0 (row 2) and 1/2 (row 1)
    assert measured["intervals"] == {"rate": [0.0, 0.5], "none": [0.0, 0.0]}


def test_counts_by_group() -> None:
    counts = {"right": np.array([1.0, 0.0, 1.0]), "asked": np.ones(3)}
    found = grouped(counts, ["y", "x", "y"])
    assert {name: column.tolist() for name, column in found.items()} == {
        "right": [0.0, 2.0],
        "asked": [1.0, 2.0],
    }
    assert grouped(counts, None) is counts
