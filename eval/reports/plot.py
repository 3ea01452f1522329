"""The picture of runs: of each benchmark one measure by part, or two against each other.

Needs matplotlib, which nothing else here does: `pip install -e ".[plot]"`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from eval.benchmarks.base import Benchmark
from eval.errors import EvalError
from eval.reports import table
from eval.reports.table import Column, Row, Value

# Okabe and Ito's colours, distinct for colour-blind readers; markers are distinct in print.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
FAINT = "#6e6e73"
NOTE = "Bars: 95 % bootstrap intervals over images. Hollow: the degeneration alarm rings."

Rows: TypeAlias = Mapping[tuple[str, str, str, str], Row]
"""By split, benchmark, part and measure."""


def plot(folders: Sequence[Path], path: Path) -> None:
    """Write the picture of these run folders, a row of panels a split, in the format of `path`."""
    columns = table.read(folders)
    rows = {(r.split, r.benchmark.name, r.part, r.measure): r for r in table.rows(columns)}
    panels = [b for b in table.benchmarks(columns) if b.plot and any(k[1] == b.name for k in rows)]
    names = {panel.name for panel in panels}
    drawn = [s for s in table.splits(columns) if any(k[0] == s and k[1] in names for k in rows)]
    if not drawn:
        raise EvalError("nothing to plot: the runs hold no scores of a benchmark that is drawn")
    size = (6 * len(panels), 4.4 * len(drawn) + 0.8)
    figure = _matplotlib().Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(drawn), len(panels), squeeze=False)
    for line, split in zip(grid, drawn, strict=True):
        for axes, benchmark in zip(line, panels, strict=True):
            draw = _against if len(benchmark.plot) == 2 else _by_part
            draw(axes, columns, rows, split, benchmark)
            axes.grid(color="#e5e5ea", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    handles = [_points(grid[0, 0], index, [], []) for index in range(len(columns))]
    labels = [column.name for column in columns]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
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


def _against(
    axes: Any, columns: Sequence[Column], rows: Rows, split: str, benchmark: Benchmark
) -> None:
    """One measure against another, such as invention against coverage: shorter responses move
    down and to the left."""
    across, up = benchmark.plot
    names = [benchmark.label("", key).removesuffix(" %") for key in (up, across)]
    axes.set_title(f"{split}: {names[0]} against {names[1]}", loc="left", fontsize=11)
    pair = [rows.get((split, benchmark.name, "", key)) for key in (across, up)]
    if pair[0] is None or pair[1] is None:
        _empty(axes, "no responses")
        return
    axes.set_xlabel(_axis(benchmark, across))
    axes.set_ylabel(_axis(benchmark, up))
    for index, (x, y) in enumerate(zip(pair[0].values, pair[1].values, strict=True)):
        if x is not None and y is not None:
            rings = benchmark.alarms(columns[index].scores(benchmark, split) or {})
            _points(axes, index, [(100 * x.value, x)], [(100 * y.value, y)], hollow=bool(rings))


def _by_part(
    axes: Any, columns: Sequence[Column], rows: Rows, split: str, benchmark: Benchmark
) -> None:
    """One measure by part, the runs side by side within each."""
    (key,) = benchmark.plot
    here = (split, benchmark.name, key)
    by_part = {r.part: r for r in rows.values() if (r.split, r.benchmark.name, r.measure) == here}
    label = benchmark.label("", key).removesuffix(" %").replace(",", "")
    axes.set_title(f"{split}: {label}", loc="left", fontsize=11)
    if not by_part:
        _empty(axes, "no responses")
        return
    axes.set_ylabel(_axis(benchmark, key))
    axes.set_xticks(range(len(by_part)), [*by_part])
    axes.set_xlim(-0.5, len(by_part) - 0.5)
    axes.grid(visible=False, axis="x")
    step = min(0.12, 0.7 / len(columns))
    for index in range(len(columns)):
        shift = (index - (len(columns) - 1) / 2) * step
        values = [row.values[index] for row in by_part.values()]
        points = [(n + shift, value) for n, value in enumerate(values) if value is not None]
        _points(
            axes, index, [(x, None) for x, _ in points], [(100 * v.value, v) for _, v in points]
        )


def _axis(benchmark: Benchmark, key: str) -> str:
    """What an axis shows, and which way is better."""
    measure = benchmark.measures[key]
    better = "(← less is better)" if measure.direction < 0 else "(more is better →)"
    return f"{measure.label}  {better}"


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
