"""python -m eval modes: every way of generating, each method against the slow reference.

The ways themselves stand in `eval.support.ways`, the reference in `eval.support.reference`.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from eval.errors import EvalError
from eval.reports.table import layout
from eval.support import pages
from eval.support.ways import MODES, SIDES, Row, measure


def modes(as_json: bool, out: Path | None, docs: bool = False) -> None:
    """Measure all, then print a Markdown table or one JSON list of `{mode, method, max_error, ok,
    note}`; with `out`, write it there too, with `docs` into docs/generation.md. Raises EvalError
    where a way is wrong.
    """
    rows = measured()
    text = json.dumps([asdict(row) for row in rows], indent=1) if as_json else markdown(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    if docs:
        pages.write("generation", "modes", markdown(rows))
    print(text)
    wrong = [f"{row.mode} with {row.method}" for row in rows if not row.ok]
    if wrong:
        raise EvalError(f"not what the reference gives: {', '.join(wrong)}")


def measured() -> list[Row]:
    """A row for every way and method; some lines of progress go to stderr."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    known = [name for name, mode in MODES.items() if mode.known]
    pairs = [(mode, side) for mode in known for side in SIDES]
    return [measure(mode, side) for mode, side in tqdm(pairs, desc="modes", leave=False)]


def markdown(rows: Sequence[Row]) -> str:
    """One line a way: the largest error over the methods, who is refused, and the notes."""
    table = layout(["way of generating", "methods", "largest error", "note"], list(_lines(rows)))
    refusals = dict.fromkeys(row.note for row in rows if row.max_error is None)
    return "\n".join([table, "", *(f"- {refusal}" for refusal in refusals)]).rstrip()


def _lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    for mode in dict.fromkeys(row.mode for row in rows):
        mine = [row for row in rows if row.mode == mode]
        ran = [row for row in mine if row.max_error is not None]
        refused = [row.method for row in mine if row.max_error is None]
        notes = [row.note for row in ran[:1] if row.note]
        if refused:
            notes.append(f"refused: {'; '.join(refused)}")
        worst = max((row.max_error for row in ran if row.max_error is not None), default=None)
        error = "-" if worst is None else f"{worst:.0e}"
        wrong = [row.method for row in ran if not row.ok]
        if wrong:
            notes.append(f"**wrong**: {'; '.join(wrong)}")
        yield [mode, f"{len(ran)} of {len(mine)}", error, "; ".join(notes)]
