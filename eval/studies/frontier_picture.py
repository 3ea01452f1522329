"""The picture of a frontier: a panel a split, each run a point with its ellipse.

Needs matplotlib, as `eval table --plot` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks import registry
from eval.reports.plot import COLOURS, FAINT, MARKERS, matplotlib_figure

NOTE = "Ellipses: 95 % bootstrap regions over images. Hollow: runs without methods."


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture in the format of `path`."""
    panels = [
        (registry.requested([name])[name], split, found)
        for name, splits in result.items()
        for split, found in splits.items()
    ]
    size = (6.4 * len(panels), 5.6)
    figure = matplotlib_figure("frontier.png").Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (benchmark, split, found) in zip(grid, panels, strict=True):
        about: Any = benchmark.frontier
        for index, (name, run) in enumerate(found["runs"].items()):
            _point(axes, index, name, run, about)
        gain, cost = (benchmark.label("", key) for key in (about.gain, about.cost))
        axes.set_title(f"{split}, {found['n']} images", loc="left", fontsize=11)
        axes.set_xlabel(f"{gain}  (more is better →)")
        axes.set_ylabel(f"{cost}  (← less is better)")
        axes.grid(color="#e5e5ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(NOTE, fontsize=9, color=FAINT)
    figure.savefig(path)


def _point(axes: Any, index: int, name: str, run: Mapping[str, Any], about: Any) -> None:
    from matplotlib.patches import Ellipse

    colour = COLOURS[index % len(COLOURS)]
    region = run["ellipse"]
    center = 100 * region["center"][0], 100 * region["center"][1]
    width, height = 100 * region["width"], 100 * region["height"]
    axes.add_patch(
        Ellipse(center, width, height, angle=region["angle"], color=colour, alpha=0.12, lw=0)
    )
    axes.plot(
        [100 * run[about.gain]["value"]],
        [100 * run[about.cost]["value"]],
        marker=MARKERS[index % len(MARKERS)],
        color=colour,
        markerfacecolor="white" if run["trivial"] else colour,
        markersize=8,
        linestyle="none",
        label=name,
    )
