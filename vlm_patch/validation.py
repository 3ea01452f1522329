"""Checks of hyperparameters; each message says what was found and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_number(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> None:
    """Raises ValueError unless `value` is a finite number in [low, high] (in (low, high] if
    `above`).
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        if high < math.inf:
            expected = f"a number from {low:g} to {high:g}"
        elif low == -math.inf:
            expected = "a finite number"
        else:
            expected = f"a finite number {'above' if above else 'of at least'} {low:g}"
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


def check_whole(name: str, value: int, size: int | None = None) -> None:
    """Raises ValueError unless `value` is an integer of at least 0, and below `size` where that
    is known.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: found {value!r}, expected an integer of at least 0")
    if size is not None and value >= size:
        raise ValueError(f"{name}: found {value}, but this model has only 0 to {size - 1}")


def check_wholes(name: str, values: Sequence[int] | None, size: int | None = None) -> None:
    """The same for every one of a sequence of layers or channels; None is none."""
    if values is not None and not isinstance(values, list | tuple | range):
        raise ValueError(
            f"{name}: found {values!r}, expected a list or a range of integers, such as [1, 2]"
        )
    for value in values or ():
        check_whole(name, value, size)


def check_flag(name: str, value: bool) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: found {value!r}, expected True or False")
