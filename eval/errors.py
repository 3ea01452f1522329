"""The one error of `eval` that is meant for its user: it says what was found, what was expected
and what to do."""

from __future__ import annotations


class EvalError(ValueError):
    """Bad input of an evaluation: a file, a row, a field, a setting."""
