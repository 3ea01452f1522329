"""The figures that were timed, as Markdown: what must be reached, then everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import isfinite
from statistics import median
from typing import Any, TypeAlias

from eval.reports.table import layout
from eval.speed.goals import CARD, CPU, METHODS, Goal

Record: TypeAlias = Mapping[str, Any]
Row: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Row]

KINDS = {
    "ours": "vlm_patch",
    "release": "release-style",
    "again": "stock, again",
    "eager": "stock, eager",
    "text only": "stock, prompt without image",
    "idle": "vlm_patch, every head off",
}
UNITS = {
    "attention": "ms",
    "prefill": "ms",
    "decode": "ms a token",
    "compiled": "ms a token",
    "idle": "ms a token",
    "generate": "s",
    "answers": "s",
    "memory": "MB",
    "launches": "a token and layer",
    "waits": "a token",
}
DIGITS = {"ratio": 3, "share": 3, "megabytes": 0, "microseconds": 1, "faster": 1, "count": 1}
AT_LEAST = ("share", "faster")
"""Figures that are better where they are higher."""


def markdown(record: Record) -> str:
    """The complete report."""
    rows: Rows = record["rows"]
    header = ["shape", "batch", "phase", "side", "method", "figure", "times stock", "pairs"]
    figures = [_figure(row) for row in rows if not row["failed"]]
    notes = "".join(f"- {note}\n" for note in _notes(rows))
    return f"{summary(record)}\n{layout(header, figures)}\n\n{notes}"


def summary(record: Record) -> str:
    """The machine, what must be reached on it, what failed: a block of docs/speed.md."""
    rows: Rows = record["rows"]
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    said = [
        f"Measured in {record['minutes']:.1f} minutes on: {machine}.",
        "Times the stock model under SDPA, median of neighbouring pairs; bounds in brackets, what "
        "misses one is bold. Stock, again: the stock model timed next to itself.",
    ]
    goals = [goal for goal in goals_of(record) if _of_goal(rows, goal)]
    if goals:
        header = ["", *METHODS.values(), KINDS["again"]]
        said.append(layout(header, [_line(rows, goal) for goal in goals]))
    failures = [*_failures(rows), *(f"{k}: {v}" for k, v in record.get("failed", {}).items())]
    failures = [f"- failed: {failure}" for failure in failures]
    failures += [f"- warned: {' '.join(text.split())[:300]}" for text in record.get("warned", ())]
    said += ["\n".join(failures)] * bool(failures)
    return "\n\n".join(said) + "\n"


def goals_of(record: Record) -> tuple[Goal, ...]:
    return CARD if place(record) == "card" else CPU


def place(record: Record) -> str:
    """ "card" or "cpu"."""
    return "card" if str(record["machine"].get("device", "")).startswith("cuda") else "cpu"


# ---- what must be reached


def _line(rows: Rows, goal: Goal) -> list[str]:
    cells = [_cell(rows, goal, method) for method in METHODS]
    again = _find(rows, goal, "again", "")
    shown = again is not None and goal.figure in ("ratio", "share") and again["ratio"] is not None
    return [goal.title, *cells, _figure_of(rows, goal, again, "") if shown and again else "-"]


def _cell(rows: Rows, goal: Goal, method: str) -> str:
    """The figure, bold where it misses the bound, and the bound in brackets."""
    row, bound = _find(rows, goal, goal.kind, method), _bound(rows, goal, method)
    if bound is None:
        return "-" if row is None or row["failed"] else _figure_of(rows, goal, row, method)
    value = None if row is None or row["failed"] else _value(rows, goal, row, method)
    text = "failed" if row is not None and row["failed"] else "-"
    if row is not None and value is not None:
        text = _figure_of(rows, goal, row, method)
        reached = value >= bound if goal.figure in AT_LEAST else value <= bound
        text = text if reached else f"**{text}**"
    if not isfinite(bound):
        return text
    digits = 2 if goal.figure in ("ratio", "share") else 0
    return f"{text} ({'>=' if goal.figure in AT_LEAST else '<='} {bound:.{digits}f})"


def _bound(rows: Rows, goal: Goal, method: str) -> float | None:
    bound = goal.bounds.get(method)
    extra = _find(rows, goal, "text only", "") if goal.rows and method in ("vhr", "all") else None
    return bound if bound is None or extra is None else bound + float(extra["ratio"]["median"])


def _figure_of(rows: Rows, goal: Goal, row: Row, method: str) -> str:
    value = _value(rows, goal, row, method)
    if value is None:
        return "-"
    shown = f"{value:{'+' if goal.figure == 'megabytes' else ''}.{DIGITS[goal.figure]}f}"
    return f"{shown}, stock {row['stock'][0]:.1f}" if goal.figure == "count" else shown


def _value(rows: Rows, goal: Goal, row: Row, method: str) -> float | None:
    """What is judged."""
    pairs = list(zip(row["values"], row["stock"], strict=True))
    if goal.figure == "faster":
        release = _find(rows, goal, "release", method)
        return float(release["ratio"]["median"] / row["ratio"]["median"]) if release else None
    if goal.figure == "share":
        return float(median(stock / own for own, stock in pairs))
    if goal.figure == "microseconds":
        return float(1e6 * median(own - stock for own, stock in pairs) / row["layers"])
    if goal.figure == "megabytes":
        return float(pairs[0][0] - pairs[0][1])
    if goal.figure == "count":
        return float(pairs[0][0])
    return float(row["ratio"]["median"])


def _of_goal(rows: Rows, goal: Goal) -> list[Row]:
    keys = goal.shape, goal.phase, goal.batch
    return [row for row in rows if (row["shape"], row["phase"], row["batch"]) == keys]


def _find(rows: Rows, goal: Goal, kind: str, method: str) -> Row | None:
    of_goal = _of_goal(rows, goal)
    return next((r for r in of_goal if (r["kind"], r["method"]) == (kind, method)), None)


def _failures(rows: Rows) -> Iterator[str]:
    """One line for all sides of a phase that failed for the same reason."""
    broken = [row for row in rows if row["failed"]]
    for key, same in groupby(broken, lambda r: (r["shape"], r["phase"], r["batch"], r["failed"])):
        names = ", ".join(row["method"] or KINDS[row["kind"]] for row in same)
        yield f"{key[0]}, {key[1]}, batch {key[2]} ({names}): {key[3]}"


# ---- everything


def _ratio(row: Row) -> str:
    ratio = row["ratio"]
    if ratio is None:
        return "-"
    return f"{ratio['median']:.3f} [{ratio['min']:.3f}, {ratio['max']:.3f}]"


def _figure(row: Row) -> list[str]:
    phase = row["phase"]
    scale = 1000 if UNITS[phase].startswith("ms") else 1
    figure = f"{scale * row['value']:.4g} {UNITS[phase]}"
    if phase in ("generate", "answers"):
        named = "captions/s" if phase == "generate" else "questions/s"
        figure += f", {row['batch'] / row['value']:.3g} {named}"
    method = row["on"] or row["method"] or "-"
    return [
        row["title"],
        str(row["batch"]),
        phase,
        KINDS[row["kind"]],
        method,
        figure,
        _ratio(row),
        str(len(row["values"])),
    ]


def _notes(rows: Rows) -> Iterator[str]:
    """What a reader must know."""
    phases, kinds = ({row[key] for row in rows} for key in ("phase", "kind"))
    if "release" in kinds:
        yield (
            "release-style: eager attention with S x S weights, batch 1 (support/release_style.py)"
        )
    if "attention" in phases:
        yield "attention: seconds inside the attention function alone, linear layers left out"
    if "memory" in phases:
        yield (
            "memory: peak of a prefill above the model; on a CPU its linear layers are narrow, "
            "since the peak of wide ones (the MLP's) would hide that of attention"
        )
    if "text only" in kinds:
        yield (
            "stock, prompt without image: the rows that VHR adds to a prompt; they come to its "
            "bound"
        )
    if "generate" in phases:
        yield "generate: every side makes equally many tokens"
    if "launches" in phases:
        yield (
            "launches: kernels, copies and fills of a token, those outside the layers too, by "
            "the layers (on a CPU operators of torch); waits: for a value from the device"
        )
