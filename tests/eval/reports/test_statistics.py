"""The tests and fits against values worked out by hand."""

import math

import numpy as np
import pytest

from eval.reports.statistics import ellipse, holm, permutation_test, poisson, smallest_difference


def share(counts: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"share": (counts["wrong"], counts["said"])}


def counts(wrong: list[int], said: list[int]) -> dict[str, np.ndarray]:
    return {"wrong": np.array(wrong), "said": np.array(said)}


def test_holm_by_hand() -> None:
    """0.01 times 3; 0.02 times 2, the 0.03 before it being no larger; 0.03 not below that."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_permutations_are_all_tried_where_they_are_few() -> None:
    """Five pairs that all differ one way: 2 of 32 exchanges are as extreme."""
    before, after = counts([1] * 5, [2] * 5), counts([0] * 5, [2] * 5)
    assert permutation_test(before, after, share)["share"] == 2 / 32
    # of 1, 1 and -1 the sum is 1: at least as far from 0 are all sums of three odd numbers
    before, after = counts([1, 1, 0], [2] * 3), counts([0, 0, 1], [2] * 3)
    assert permutation_test(before, after, share)["share"] == 1.0
    assert permutation_test(before, before, share)["share"] == 1.0


def test_drawn_permutations_come_near_the_exact_p() -> None:
    draw = np.random.default_rng(3)
    wrong = draw.integers(0, 3, size=(2, 12))
    before, after = counts([*wrong[0]], [4] * 12), counts([*wrong[1]], [4] * 12)
    exact = permutation_test(before, after, share)["share"]
    drawn = permutation_test(before, after, share, draws=4000)["share"]
    assert 0.05 < exact < 0.95
    assert drawn == pytest.approx(exact, abs=0.03)


def test_poisson_of_two_groups_is_their_rates() -> None:
    """3 of 30 and 8 of 40: 0.1, and twice that."""
    x = np.array([[1, 0], [1, 0], [1, 1], [1, 1]])
    fit = poisson(x, np.array([1, 2, 3, 5]), np.array([10, 20, 20, 20]), np.arange(4))
    assert fit.coefficients == pytest.approx([math.log(0.1), math.log(2)], abs=1e-9)
    value, error = fit.combine([1, 1])
    assert math.exp(value) == pytest.approx(0.2)
    # scores: y - expected = 3 - 4 and 5 - 4; the information of the group is its 8 expected ones
    assert error == pytest.approx(math.sqrt((1 + 1) / 8**2))


def test_poisson_knows_what_varies_together() -> None:
    """Two rows that are one group and wrong by opposite amounts are wrong by nothing."""
    x, exposure = np.ones((4, 1)), np.full(4, 10)
    y = np.array([3, 5, 3, 5])
    assert poisson(x, y, exposure, np.array([0, 0, 1, 1])).combine([1])[1] == pytest.approx(0)
    assert poisson(x, y, exposure, np.arange(4)).combine([1])[1] == pytest.approx(2 / 16)


def test_the_ellipse_of_points_on_two_axes() -> None:
    """Four points: variances 8/3 across and 2/3 up; 95 % of two dimensions is -2 ln 0.05."""
    found = ellipse(np.array([12.0, 8, 10, 10]), np.array([5.0, 5, 6, 4]))
    axis = -2 * math.log(0.05)
    assert found.center == (10, 5)
    assert found.width == pytest.approx(2 * math.sqrt(axis * 8 / 3))
    assert found.height == pytest.approx(2 * math.sqrt(axis * 2 / 3))
    assert found.angle % 180 == pytest.approx(0)
    turned = ellipse(np.array([1.0, -1, 0.1, -0.1]), np.array([1.0, -1, -0.1, 0.1]))
    assert turned.angle == pytest.approx(45)


def test_the_smallest_difference_is_2_8_standard_errors() -> None:
    assert smallest_difference(np.array([1.0, 3.0])) == pytest.approx(2.801585 * math.sqrt(2))
