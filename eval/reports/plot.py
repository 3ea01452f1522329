"""The picture of runs: CHAIR_S against recall, and POPE by strategy, each with its intervals.

Needs matplotlib, which nothing else here does: `pip install -e ".[plot]"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from eval.benchmarks import alarm
from eval.errors import EvalError
from eval.reports import table
from eval.reports.table import Column, Row, Value

# Okabe and Ito's colours, distinct for colour-blind readers; markers are distinct in print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
FAINT = "#6e6e73"
NOTE = "Bars: 95 % bootstrap intervals over images. Hollow: the degeneration alarm rings."

Rows: TypeAlias = Mapping[tuple[str, str], Row]


def plot(folders: Sequence[Path], path: Path) -> None:
    """Write the picture of these run folders, two panels a split, in the format of `path`."""
    columns = table.read(folders)
    rows = {(row.split, row.key): row for row in table.rows(columns)}
    drawn = [split for split in table.splits(columns) if any(key[0] == split for key in rows)]
    if not drawn:
        raise EvalError("nothing to plot: the runs hold no scores")
    figure = _matplotlib().Figure(
        figsize=(12, 4.4 * len(drawn) + 0.8), dpi=150, layout="constrained"
    )
    grid = figure.subplots(len(drawn), 2, squeeze=False)
    for (left, right), split in zip(grid, drawn, strict=True):
        _chair(left, columns, rows, split)
        _pope(right, columns, rows, split)
        for axes in (left, right):
            axes.grid(color="#e5e5ea", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    handles = [_points(grid[0, 0], index, [], []) for index in range(len(columns))]
    names = [column.name for column in columns]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.supxlabel(NOTE, fontsize=9, color=FAINT)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise EvalError(f"--plot {path}: {error}; name the picture FILE.png") from error


def _matplotlib() -> Any:
    try:
        from matplotlib import figure
    except ImportError:
        raise EvalError('--plot needs matplotlib: pip install -e ".[plot]"') from None
    return figure


def _chair(axes: Any, columns: Sequence[Column], rows: Rows, split: str) -> None:
    """Invention against coverage: a run with shorter captions moves down and to the left."""
    axes.set_title(f"{split}: CHAIR_S against recall", loc="left", fontsize=11)
    if (split, "chair_s") not in rows:
        _empty(axes, "no captions")
        return
    axes.set_xlabel("recall %  (more is better →)")
    axes.set_ylabel("CHAIR_S %  (← less is better)")
    recall, invented = rows[split, "recall"].values, rows[split, "chair_s"].values
    for index, (x, y) in enumerate(zip(recall, invented, strict=True)):
        if x is not None and y is not None:
            rings = alarm.ringing(columns[index].metrics["chair"][split])
            _points(axes, index, [(100 * x.value, x)], [(100 * y.value, y)], hollow=bool(rings))


def _pope(axes: Any, columns: Sequence[Column], rows: Rows, split: str) -> None:
    """Accuracy by strategy, the runs side by side within each."""
    axes.set_title(f"{split}: POPE accuracy", loc="left", fontsize=11)
    names = table.strategies(columns, split)
    if not names:
        _empty(axes, "no POPE questions")
        return
    axes.set_ylabel("accuracy %  (more is better →)")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(visible=False, axis="x")
    step = min(0.12, 0.7 / len(columns))
    for index in range(len(columns)):
        shift = (index - (len(columns) - 1) / 2) * step
        values = [rows[split, f"pope_{name}_accuracy"].values[index] for name in names]
        points = [(n + shift, value) for n, value in enumerate(values) if value is not None]
        _points(
            axes, index, [(x, None) for x, _ in points], [(100 * v.value, v) for _, v in points]
        )


def _empty(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes, color=FAINT)
    axes.set_xticks([])
    axes.set_yticks([])


Points: TypeAlias = Sequence[tuple[float, "Value | None"]]


def _points(axes: Any, index: int, across: Points, up: Points, hollow: bool = False) -> Any:
    """The points of one run in its colour and marker, with bars where a Value has an interval."""
    colour = COLOURS[index % len(COLOURS)]
    return axes.errorbar(
        [at for at, _ in across],
        [at for at, _ in up],
        xerr=_bars(across),
        yerr=_bars(up),
        fmt=MARKERS[index % len(MARKERS)],
        color=colour,
        markerfacecolor="white" if hollow else colour,
        markersize=max(6, 9.5 - 0.9 * index),  # so that points that coincide all show
        capsize=2,
        elinewidth=1.2,
        alpha=0.9,
    )


def _bars(points: Points) -> list[list[float]] | None:
    """How far the intervals reach below and above, in percent points; None without intervals."""
    values = [value for _, value in points if value is not None]
    if not values:
        return None
    return [
        [max(0, 100 * (value.value - value.low)) for value in values],
        [max(0, 100 * (value.high - value.value)) for value in values],
    ]
