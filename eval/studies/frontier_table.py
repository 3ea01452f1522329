"""The tables of a frontier: the comparison of the runs, and where in a response they are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.benchmarks import registry
from eval.benchmarks.base import Benchmark
from eval.reports import table


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a frontier, two a split: the comparison, and the cost by place."""
    parts = []
    for name, splits in result.items():
        benchmark = registry.requested([name])[name]
        for split, found in splits.items():
            parts += [f"## {split}, {found['n']} images", _table(benchmark, found), NOTE]
            parts.append(_by_place(benchmark, found))
    return "\n\n".join(parts) + "\n"


NOTE = (
    "Differences are paired, in percent points, with 95 % bootstrap intervals; p by permutation of "
    "the pairs, Holm-corrected over all in its two columns. Smallest: the difference that so many "
    "images would have shown four times in five. At equal length: Poisson regression, at the stock "
    "model's mean length, and in brackets the quotient to the stock model's. Over trivial: above "
    "what mixing the stock model with one trivial baseline reaches at the same amount said."
)


def _table(benchmark: Benchmark, found: Mapping[str, Any]) -> str:
    about: Any = benchmark.frontier
    gain, cost = (benchmark.label("", key) for key in (about.gain, about.cost))
    header = ["run", gain, "change", "p", cost, "change", "p", "smallest", "length"]
    header += ["at equal length", "over trivial", "verdict"]
    rows = []
    for name, run in found["runs"].items():
        kind = "stock" if name == found["stock"] else "trivial" if run["trivial"] else ""
        cells = [f"{name} ({kind})" if kind else name]
        for key in (about.gain, about.cost):
            cells.append(_percent(run[key]["value"]))
            change = run.get("changes", {}).get(key)
            cells += ["", ""] if change is None else [_moved(change), f"{change['holm']:.3g}"]
        changes = run.get("changes")
        cells.append(_percent(changes[about.cost]["smallest"]) if changes else "")
        cells += [f"{run['length']:.1f}", _at_length(run["adjusted"])]
        over = run.get("over_trivial")
        cells += ["" if over is None else _moved(over), run.get("verdict", "")]
        rows.append(cells)
    return table.layout(header, rows)


def _by_place(benchmark: Benchmark, found: Mapping[str, Any]) -> str:
    about: Any = benchmark.frontier
    places = list(next(iter(found["runs"].values()))["by_place"])
    header = [f"{benchmark.label('', about.cost)} in words", *places]
    rows = []
    for name, run in found["runs"].items():
        cells = []
        for part in run["by_place"].values():
            said = part["counts"][about.said]
            cells.append(f"{_percent(part[about.cost])} of {said}" if said else "-")
        rows.append([name, *cells])
    return table.layout(header, rows)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _moved(change: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in change["interval"])
    return f"{100 * change['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _at_length(adjusted: Mapping[str, Any] | None) -> str:
    if adjusted is None:
        return "-"
    low, high = adjusted["interval"]
    quotient = f" (x{adjusted['ratio']:.2f} [{low:.2f}, {high:.2f}])" if low < high else ""
    return f"{_percent(adjusted['value'])}{quotient}"
