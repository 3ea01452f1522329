"""How much is said that is true against how much is wrong: runs beside trivial baselines.

A method that makes a model say less invents less for free. So each run is compared, image by image,
with the stock model, and with what a token limit, a temperature or another prompt reach at the same
amount said. Runs without methods are such trivial baselines; the first of them is the stock model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks import registry
from eval.benchmarks.base import Benchmark, Frontier
from eval.benchmarks.intervals import Numbers, Tally, interval, ratio, resample
from eval.errors import EvalError
from eval.reports import statistics, table
from eval.reports.comparable import RESPONSE_KEYS, Run

LEVEL = 0.05
ASKED = (*RESPONSE_KEYS, "prompt")
"""Keys of a row that may differ from run to run: what was asked, and the response."""


@dataclass(frozen=True)
class Side:
    """One run on one split.

    gain, cost: the two measures. draws: the same of each resample of the images, `[draws]`; draw k
    holds the same images for every side.
    """

    name: str
    trivial: bool
    tally: Tally
    places: Mapping[str, Tally]
    gain: float
    cost: float
    draws: tuple[Numbers, Numbers]

    @classmethod
    def of(cls, name: str, trivial: bool, tally: Tally, places: Any, about: Frontier) -> Side:
        rows = np.stack([np.asarray(c, dtype=float) for c in tally.counts.values()], axis=1)

        def measured(sums: Numbers) -> list[Numbers]:
            found = tally.ratios(dict(zip(tally.counts, sums.T, strict=True)))
            return [ratio(*found[key]) for key in (about.gain, about.cost)]

        gain, cost = (float(value) for value in measured(rows.sum(axis=0)))
        drawn = measured(resample(rows))
        return cls(name, trivial, tally, places, gain, cost, (drawn[0], drawn[1]))


def frontier(folders: Sequence[Path]) -> dict[str, Any]:
    """The frontier of every benchmark that has one and every split, as one dictionary for JSON.

    Shares lie in [0, 1]. Raises EvalError where the runs cannot be compared.
    """
    names = [column.name for column in table.read(folders)]
    runs = [Run.read(folder) for folder in folders]
    trivial = [not run.record["settings"]["methods"] for run in runs]
    if True not in trivial or len(runs) < 2:
        raise EvalError(
            "a frontier needs the run of the stock model and others beside it: found "
            f"{len(runs)} runs, {sum(trivial)} of them without methods. Make the first by, for "
            "example, python -m eval run configs/pocket/baseline.yaml --out runs/stock"
        )
    order = sorted(range(len(runs)), key=lambda i: (i != trivial.index(True), not trivial[i]))
    runs, names = [runs[i] for i in order], [names[i] for i in order]
    trivial = [trivial[i] for i in order]
    _check_model(runs)
    result: dict[str, Any] = {}
    for benchmark in _drawn(runs):
        for split in runs[0].record["data"]["images"]:
            keys = _shared(runs, benchmark, split)
            if keys:
                sides = [
                    _side(benchmark, name, is_trivial, run, keys)
                    for name, is_trivial, run in zip(names, trivial, runs, strict=True)
                ]
                result.setdefault(benchmark.name, {})[split] = _compared(
                    benchmark, sides, [key[2] for key in keys]
                )
    if not result:
        raise EvalError("the runs share no responses to a benchmark that has a frontier")
    return result


def _check_model(runs: Sequence[Run]) -> None:
    models = dict.fromkeys(run.record["settings"]["model"] for run in runs)
    if len(models) > 1:
        raise EvalError(
            f"the runs are of different models ({', '.join(models)}): a frontier compares ways of "
            "using one, so give the runs of each model by themselves"
        )


def _drawn(runs: Sequence[Run]) -> list[Benchmark]:
    """The benchmarks with a frontier that every run answered."""
    asked = [registry.requested(run.record["settings"]["tasks"]) for run in runs]
    shared = [b for name, b in asked[0].items() if all(name in others for others in asked)]
    return [benchmark for benchmark in shared if benchmark.frontier is not None]


def _shared(runs: Sequence[Run], benchmark: Benchmark, split: str) -> list[tuple[str, ...]]:
    """The samples of a split that all runs answered, if they were asked about the same images."""
    samples = [
        {k: r for k, r in run.samples(benchmark.name).items() if k[1] == split} for run in runs
    ]
    for run, found in zip(runs, samples, strict=True):
        if found.keys() != samples[0].keys():
            raise EvalError(
                f"{runs[0].path} and {run.path}: the images of {split} differ "
                f"({len(samples[0])} and {len(found)}, {len(samples[0].keys() & found.keys())} in "
                "common); a frontier needs the same ones in every run"
            )
    keys = sorted(set.intersection(*(set(run.rows) for run in runs)) & samples[0].keys())
    for run in runs:
        if any(_facts(run.rows[key]) != _facts(runs[0].rows[key]) for key in keys):
            raise EvalError(f"{runs[0].path} and {run.path}: the annotations of {split} differ")
        if (reader := run.reader(benchmark)) != (first := runs[0].reader(benchmark)):
            raise EvalError(f"{runs[0].path} is read by {first}, {run.path} by {reader}")
    return keys


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ASKED}


def _side(
    benchmark: Benchmark, name: str, trivial: bool, run: Run, keys: Sequence[tuple[str, ...]]
) -> Side:
    tally = run.tallies(benchmark, keys)[""]
    places = run.by_place(benchmark, keys)
    assert benchmark.frontier is not None
    return Side.of(name, trivial, tally, places, benchmark.frontier)


def _compared(benchmark: Benchmark, sides: Sequence[Side], images: Sequence[str]) -> dict[str, Any]:
    """Everything about one split. sides: the stock model, then trivial baselines, then methods."""
    about: Any = benchmark.frontier
    stock, *others = sides
    tests = [
        statistics.permutation_test(stock.tally.counts, s.tally.counts, s.tally.ratios)
        for s in others
    ]
    pairs = [(n, key) for n in range(len(others)) for key in (about.gain, about.cost)]
    holm = dict(zip(pairs, statistics.holm([tests[n][key] for n, key in pairs]), strict=True))
    adjusted = _adjusted(sides, about, images)
    found: dict[str, Any] = {}
    for n, side in enumerate(sides):
        found[side.name] = {
            "trivial": side.trivial,
            **{
                key: {"value": value, "interval": list(interval(draws))}
                for key, value, draws in _measures(side, about)
            },
            "ellipse": vars(statistics.ellipse(*side.draws)),
            "length": float(np.mean(side.tally.counts[about.length])),
            "adjusted": adjusted[n],
            "by_place": {place: of_place.report() for place, of_place in side.places.items()},
        }
        if n:
            changes = {
                key: _change(one, other, tests[n - 1][key], holm[n - 1, key])
                for (key, *one), (_, *other) in zip(
                    _measures(stock, about), _measures(side, about), strict=True
                )
            }
            over = None if side.trivial else _over_trivial(side, stock, others)
            found[side.name] |= {"changes": changes, "over_trivial": over}
            found[side.name]["verdict"] = verdict(changes[about.gain], changes[about.cost], over)
    return {"n": len(images), "stock": stock.name, "runs": found}


def _measures(side: Side, about: Frontier) -> Iterator[tuple[str, float, Numbers]]:
    yield about.gain, side.gain, side.draws[0]
    yield about.cost, side.cost, side.draws[1]


def _change(one: Sequence[Any], other: Sequence[Any], p: float, holm: float) -> dict[str, Any]:
    """From one (value, draws) to another, in pairs."""
    draws = other[1] - one[1]
    return {
        "difference": other[0] - one[0],
        "interval": list(interval(draws)),
        "p": p,
        "holm": holm,
        "smallest": statistics.smallest_difference(draws),
    }


def trivial_cost(gain: Any, stock: tuple[Any, Any], baselines: Sequence[tuple[Any, Any]]) -> Any:
    """The least cost at an amount `gain` that mixing the stock model with one trivial baseline
    reaches: on the straight line between the two, (gain, cost) each; beyond its ends, at the end.
    """
    best = stock[1] + 0 * gain
    for base_gain, base_cost in baselines:
        apart = stock[0] - base_gain
        share = np.clip(
            np.divide(stock[0] - gain, apart, out=np.zeros_like(best), where=apart != 0), 0, 1
        )
        best = np.minimum(best, stock[1] + share * (base_cost - stock[1]))
    return best


def _over_trivial(side: Side, stock: Side, others: Sequence[Side]) -> dict[str, Any] | None:
    """By how much the cost of a run lies above what trivial baselines reach at its gain; None
    without one.
    """
    base = [other for other in others if other.trivial]
    if not base:
        return None
    value = side.cost - trivial_cost(
        np.float64(side.gain), (stock.gain, stock.cost), [(b.gain, b.cost) for b in base]
    )
    draws = side.draws[1] - trivial_cost(side.draws[0], stock.draws, [b.draws for b in base])
    return {"difference": float(value), "interval": list(interval(draws))}


VERDICTS = {
    # which way cost and gain moved for certain: down -1, up 1
    (-1, -1): "better, but says less",
    (-1, 0): "better",
    (-1, 1): "better, and says more",
    (0, -1): "worse: says less",
    (0, 0): "no difference shown",
    (0, 1): "better: says more",
    (1, -1): "worse, and says less",
    (1, 0): "worse",
    (1, 1): "worse, but says more",
}


def verdict(
    gain: Mapping[str, Any], cost: Mapping[str, Any], over: Mapping[str, Any] | None
) -> str:
    """What the corrected tests say of a run, and whether it beats the trivial baselines."""
    moved = [_moved_for_certain(change) for change in (cost, gain)]
    found = VERDICTS[moved[0], moved[1]]
    if over is None or not found.startswith("better"):
        return found
    beats = "beats" if over["interval"][1] < 0 else "does not beat"
    return f"{found}; {beats} the trivial baselines"


def _moved_for_certain(change: Mapping[str, Any]) -> int:
    return 0 if change["holm"] >= LEVEL else 1 if change["difference"] > 0 else -1


def _adjusted(
    sides: Sequence[Side], about: Frontier, images: Sequence[str]
) -> list[dict[str, Any] | None]:
    """The cost of each run at the stock model's mean length, and its quotient to the stock model's:
    Poisson regression of what is wrong in a response, of so much said, on the run and the length.

    None for a run with nothing wrong, or where the stock model has nothing wrong.
    """
    kept = [side for side in sides if side.tally.counts[about.wrong].sum() > 0]
    if sides[0] not in kept:
        return [None] * len(sides)
    middle = float(np.mean(sides[0].tally.counts[about.length]))
    parts: list[list[Numbers]] = []
    for number, side in enumerate(kept):
        counts = {key: np.asarray(column, dtype=float) for key, column in side.tally.counts.items()}
        x = np.zeros((len(images), len(kept) + 1))
        x[:, number], x[:, -1] = 1, (counts[about.length] - middle) / 10
        said = counts[about.said] > 0
        parts.append(
            [part[said] for part in (x, counts[about.wrong], counts[about.said], np.array(images))]
        )
    fit = statistics.poisson(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    found: list[dict[str, Any] | None] = []
    for side in sides:
        if side not in kept:
            found.append(None)
            continue
        weights = np.zeros(len(kept) + 1)
        weights[kept.index(side)] = 1
        level = fit.combine(weights)[0]
        weights[0] -= 1
        change, error = fit.combine(weights)
        bounds = [
            math.exp(change + z * error) for z in (-statistics.NORMAL_95, statistics.NORMAL_95)
        ]
        found.append({"value": math.exp(level), "ratio": math.exp(change), "interval": bounds})
    return found
