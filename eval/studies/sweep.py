"""Many settings of the methods over one loaded model: tuned on some images, reported on others.

Every point of the grid is a run folder of its own, so an interrupted sweep is resumed. The
best point by one named measure is then run once on images that no point has seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.benchmarks import registry
from eval.benchmarks.base import Benchmark
from eval.errors import EvalError
from eval.reports import compare, table
from eval.runs import config, generate, jsonl, runner, workers
from eval.runs import samples as dataset
from eval.runs.config import Config
from eval.runs.folder import FREE
from eval.runs.samples import Sample
from eval.runs.workers import Engine, Load
from eval.schema import check_names
from eval.studies import grid
from eval.studies.grid import Point

PLAN = "sweep.yaml"


# the unpatched model, for comparison: it cannot be chosen
STOCK = Point("stock", None)


@dataclass(frozen=True)
class Sweep:
    """What is tried, and the measure that decides.

    path: the configuration
    overrides: its changes, as key=value texts
    grids: settings with their values, as key=value,value texts
    grid_heads: "layers" or "heads", to try one at a time
    measure: None for the main one of the first task
    tune_split: the split to tune on, the others are reported; None: the images of each split are
        divided in two halves by their names, the same halves in every sweep
    """

    path: Path
    overrides: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()
    grid_heads: str | None = None
    measure: str | None = None
    tune_split: str | None = None

    def config(self, overrides: Sequence[str] | None = (), held_out: bool = False) -> Config:
        """The settings of a point, or of the stock model (None), on one part of the images."""
        settings = config.load(self.path, [*self.overrides, *(overrides or ())])
        if overrides is None:
            settings = replace(settings, methods=(), options={}, layers=None, heads=None)
        if self.tune_split is None:
            return replace(settings, part="report" if held_out else "tune")
        rest = tuple(split for split in settings.splits if split != self.tune_split)
        return replace(settings, splits=rest if held_out else (self.tune_split,))


def sweep(
    request: Sweep,
    out: Path,
    load: Load = generate.load_model,
    engine: Engine = workers.answer_here,
) -> dict[str, Any]:
    """Score the grid, choose, and run the choice on the held-out images; returns the results.

    Refused if the folder holds another sweep whose held-out images have been scored.
    """
    base = request.config()
    known = measures(base)
    measure = request.measure or _main(base)
    check_names("--measure", (measure,), known)
    tune, report = _samples(request, out / "scenes")
    load = workers.once(load, engine)
    own = [method.name for method in base.build_methods()]
    points = grid.points(request.grids, _spots(base, request.grid_heads, load), own)
    plan = _plan(out, base, measure, request, points)
    tried = {
        point.name: runner.run(
            request.config(point.overrides),
            out / "tune" / point.name,
            load=load,
            samples=tune,
            engine=engine,
        )
        for point in [STOCK, *points]
    }
    best = _best({point: tried[point.name] for point in points}, base, measure)
    jsonl.replace(out / "table.md", _table(tried, base, best.name, measure))
    plan["chosen"] = best.name
    jsonl.replace(out / PLAN, yaml.safe_dump(plan, sort_keys=False))
    for point in (STOCK, best):
        settings = request.config(point.overrides, held_out=True)
        folder = out / "report" / point.name
        runner.run(settings, folder, load=load, samples=report, engine=engine)
    return {**plan, "tune": tried}


def _samples(request: Sweep, scenes: Path) -> tuple[list[Sample], list[Sample]]:
    """What to tune on and what to report; EvalError unless they have no image in common."""
    if request.tune_split and not request.config(held_out=True).splits:
        raise EvalError(
            f"--tune-split {request.tune_split} leaves no split to report: name more, "
            f"as in --set splits=[{request.tune_split},test]"
        )
    both = [dataset.samples(request.config(held_out=part), scenes) for part in (False, True)]
    tune, report = ({sample.image.name for sample in part} for part in both)
    if not tune or not report:
        raise EvalError(
            f"{len(tune)} images to tune on and {len(report)} to report: a sweep needs both, "
            f"take more images (the setting images of a task, --limit)"
        )
    if shared := tune & report:
        raise EvalError(
            f"{len(shared)} images, for example {min(shared)}, are in {request.tune_split} and in "
            f"a split to be reported: nothing may be tuned on what is reported"
        )
    return both[0], both[1]


def _spots(base: Config, kind: str | None, load: Load) -> list[Point]:
    """The layers or heads to try one by one, as the methods of the configuration act in them."""
    if kind is None:
        return []
    with workers.wrapped(*load(base), base) as patch:
        if patch is None:
            raise EvalError("--grid-heads: the configuration has no methods, so no heads to choose")
        return grid.spots(patch.heads, kind)


def _plan(
    out: Path, base: Config, measure: str, request: Sweep, points: Sequence[Point]
) -> dict[str, Any]:
    """The content of sweep.yaml before a point is chosen."""
    settings = {key: value for key, value in base.settings().items() if key not in FREE}
    axes = {"grid": [*request.grids], "grid_heads": request.grid_heads}
    criteria = {"measure": measure, "tune_split": request.tune_split}
    plan = {"settings": settings, **axes, **criteria, "points": [point.name for point in points]}
    written = yaml.safe_load((out / PLAN).read_text("utf-8")) if (out / PLAN).exists() else plan
    changed = [key for key in plan if plan[key] != written.get(key)]
    if changed and (out / "report").exists():
        raise EvalError(
            f"{out} has reported the held-out images already, for another sweep "
            f"({', '.join(changed)} changed): to choose again now would be to tune on what is "
            f"reported. Give the sweep as it was, or choose another --out and other images"
        )
    jsonl.replace(out / PLAN, yaml.safe_dump(plan, sort_keys=False))
    return plan


def _benchmarks(base: Config) -> list[Benchmark]:
    return [*registry.requested(base.tasks).values()]


def measures(base: Config) -> dict[str, tuple[Benchmark, str]]:
    """What can be tuned: the measures of the run's benchmarks that have a better side."""
    return {
        benchmark.key("", key).replace(" ", "_"): (benchmark, key)
        for benchmark in _benchmarks(base)
        for key, measure in benchmark.measures.items()
        if measure.direction
    }


def _main(base: Config) -> str:
    first = _benchmarks(base)[0]
    return first.key("", first.main or next(iter(first.measures))).replace(" ", "_")


def _best(tried: Mapping[Point, Mapping[str, Any]], base: Config, measure: str) -> Point:
    """The best point by the measure, the first of equals; none whose responses degenerate."""
    healthy = {point: metrics for point, metrics in tried.items() if not _rings(metrics, base)}
    if not healthy:
        raise EvalError("the degeneration alarm rings at every point of the grid: none is chosen")
    benchmark, key = measures(base)[measure]
    direction = benchmark.measures[key].direction
    return max(healthy, key=lambda point: direction * score(healthy[point], benchmark, key))


def _rings(metrics: Mapping[str, Any], base: Config) -> bool:
    return any(
        benchmark.alarms(scores)
        for benchmark in _benchmarks(base)
        for scores in metrics.get(benchmark.name, {}).values()
    )


def score(metrics: Mapping[str, Any], benchmark: Benchmark, key: str) -> float:
    """The mean of a measure over the splits of a run, and over the parts that have it."""
    splits = metrics.get(benchmark.name, {}).values()
    parts = [part for split in splits for part in benchmark.parts(split).values() if key in part]
    if not parts:
        raise EvalError(
            f"--measure {key}: the run has no {key} of {benchmark.name}: choose another"
        )
    return float(np.mean([part[key] for part in parts]))


def _table(tried: Mapping[str, Mapping[str, Any]], base: Config, best: str, measure: str) -> str:
    """One line a point and split; the point that was chosen is marked."""
    by_row = {
        (name, split): _cells(metrics, base, split)
        for name, metrics in tried.items()
        for split in _splits(metrics, base)
    }
    used = [*dict.fromkeys(head for cells in by_row.values() for head in cells)]
    rows = [
        [f"**{name}**" if name == best else name, split, *(cells.get(head, "-") for head in used)]
        for (name, split), cells in by_row.items()
    ]
    benchmark, key = measures(base)[measure]
    better = "more" if benchmark.measures[key].direction > 0 else "less"
    return (
        f"Tuning images only. In brackets 95 % bootstrap intervals. Chosen by {measure}, "
        f"{better} is better: {best}.\n\n{table.layout(['point', 'split', *used], rows)}\n"
    )


def _splits(metrics: Mapping[str, Any], base: Config) -> list[str]:
    return [*dict.fromkeys(split for b in _benchmarks(base) for split in metrics.get(b.name, {}))]


def _cells(metrics: Mapping[str, Any], base: Config, split: str) -> dict[str, str]:
    """The brief measures of one split and the alarm, by what heads their columns."""
    cells: dict[str, str] = {}
    for benchmark in _benchmarks(base):
        scores = metrics.get(benchmark.name, {}).get(split)
        if scores is None:
            continue
        for part, measured in benchmark.parts(scores).items():
            for key, measure in benchmark.measures.items():
                if measure.brief and key in measured["intervals"]:
                    cell = table.cell(measure, table.value(measured, key))
                    cells[benchmark.label(part, key)] = cell
        if (alarm := table.alarm_cell(benchmark, scores)) != "-":
            cells[table.ALARM] = alarm
    return cells


def markdown(result: Mapping[str, Any], out: Path) -> str:
    """The table of all points, then the one that was chosen beside the stock model, held out."""
    stock, best = (out / "report" / name for name in (STOCK.name, result["chosen"]))
    tuned = (out / "table.md").read_text("utf-8")
    return f"{tuned}\nOn held-out images:\n\n{compare.markdown(compare.compare(stock, best))}"
