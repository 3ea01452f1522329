"""What is said to the person at the keyboard: the one error that is meant for them, and notices."""

import sys

from tqdm import tqdm


class EvalError(ValueError):
    """Bad input of an evaluation: what was found, what was expected and what to do."""


def notice(text: str) -> None:
    """A line for the person who watches, beside the progress bar."""
    tqdm.write(text, file=sys.stderr)
