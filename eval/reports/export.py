"""The table of runs for other programs: CSV with a line a number, and LaTeX."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eval.errors import EvalError
from eval.reports import table
from eval.schema import unknown

SPECIAL = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def table_csv(folders: Sequence[Path]) -> str:
    """One line a run, split and measure: the value as in metrics.json, its interval, and n."""
    columns = table.read(folders)
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["run", "split", "measure", "value", "low", "high", "n"])
    rows = list(table.rows(columns))
    for index, column in enumerate(columns):
        for row in rows:
            if value := row.values[index]:
                numbers = [value.value, value.low, value.high, value.n]
                out.writerow([column.name, row.split, row.key, *numbers])
    return text.getvalue()


def latex(folders: Sequence[Path]) -> str:
    r"""A tabular for \usepackage{booktabs}; heading and notes are comments above it."""
    columns = table.read(folders)
    comments = [table.heading(columns), *(f"- {note}" for note in table.notes(columns))]
    header = ["split", "measure", *(column.name for column in columns)]
    lines = [
        *(f"% {line}" for text in comments for line in text.splitlines()),
        f"\\begin{{tabular}}{{ll{'r' * len(columns)}}}",
        "\\toprule",
        _line(header),
        "\\midrule",
        *(_line(cells) for cells in table.lines(columns)),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in text)


FORMATS: Mapping[str, Callable[[Sequence[Path]], str]] = {
    "markdown": table.markdown,
    "csv": table_csv,
    "latex": latex,
}


def write(folders: Sequence[Path], name: str) -> str:
    """The table of these run folders in the format `name`."""
    if name not in FORMATS:
        raise EvalError(unknown("format", name, FORMATS))
    return FORMATS[name](folders)
