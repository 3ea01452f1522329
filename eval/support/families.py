"""Which model families are supported, measured on tiny random models of every type.

The table of docs/models.md is written by this command and by nothing else.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from logging import ERROR
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from eval.errors import EvalError
from eval.support import pages
from eval.support.build import CLASSES
from eval.support.check import Row, measure

BOTH, FIRST, NONE = "off and end to end", "off", "-"


def models(
    types: str | None = None, as_json: bool = False, out: Path | None = None, docs: bool = False
) -> None:
    """Measures the types given (names with commas between; all by default) and prints a table, or
    JSON `[{type, delegation, end_to_end, note}]`; `out` writes it to a file, `docs` puts the
    table into docs/models.md. Raises EvalError for unknown types.
    """
    if docs and types:
        raise EvalError("the table of docs/models.md holds every type: leave out --types")
    names = _named(types)
    with quietly():
        rows = [measure(kind) for kind in names]
    text = json.dumps([asdict(row) for row in rows], indent=1) + "\n" if as_json else markdown(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    if docs:
        pages.write("models", "models", markdown(rows))
    print(text, end="")


def _named(types: str | None) -> list[str]:
    names = list(CLASSES) if types is None else [name.strip() for name in types.split(",")]
    for name in names:
        if name not in CLASSES:
            raise EvalError(f"unknown type {name!r}: expected some of {', '.join(CLASSES)}")
    return names


@contextmanager
def quietly() -> Iterator[None]:
    """On one thread, since tiny models only wait for a second one, and without the hints that
    transformers gives about every model.
    """
    threads, level = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(level)


def markdown(rows: Sequence[Row]) -> str:
    """A table of families that share a result, and how many passed."""
    exact = sum(row.delegation for row in rows)
    whole = sum(row.end_to_end for row in rows)
    count = (
        f"Of {len(rows)} types of transformers {transformers.__version__}, {exact} pass with every "
        f"head off (bit for bit) and {whole} end to end (all methods)."
    )
    lines = [["family", "verified", "notes"], ["---"] * 3, *_lines(rows)]
    return count + "\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """One line for all types of the same result, the best first."""
    alike: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        alike.setdefault((verified(row), row.note), []).append(row.type)
    order = (BOTH, FIRST, NONE)
    for (how, note), names in sorted(alike.items(), key=lambda item: order.index(item[0][0])):
        yield [", ".join(names), how, note]


def verified(row: Row) -> str:
    """How a type is verified, in the words of the table."""
    return BOTH if row.delegation and row.end_to_end else FIRST if row.delegation else NONE
