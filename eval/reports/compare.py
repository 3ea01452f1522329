"""Two runs on the same images, sample by sample: paired differences and their significance.

A difference of two means on the same images is far less noisy than either mean; intervals come from
resampling the images and taking the difference on each resample. Runs with different prompts are
refused.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks import registry
from eval.benchmarks.base import ALL, Benchmark, Measure
from eval.benchmarks.intervals import Numbers, Tally, paired
from eval.errors import EvalError
from eval.reports import table
from eval.reports.comparable import Run, obstacles
from eval.runs.folder import RunFolder


def compare(before: Path, after: Path) -> dict[str, Any]:
    """What changed from one run to the other, as one dictionary for JSON; shares lie in [0, 1].

    Per measure the two values, `difference` (after minus before) and its 95 % `interval`, over the
    samples that both answered. Raises EvalError with the reason where two runs cannot be compared.
    """
    one, two = Run.read(before), Run.read(after)
    every = _benchmarks(one.record, two.record)
    both = [b for b in every if one.samples(b.name) and two.samples(b.name)]
    if reasons := list(obstacles(one, two, both)):
        raise EvalError(f"{before} and {after} cannot be compared: {'; '.join(reasons)}")
    result: dict[str, Any] = {"before": str(before), "after": str(after)}
    shared = sorted(one.rows.keys() & two.rows.keys())
    result["unpaired"] = len(one.rows.keys() ^ two.rows.keys())
    for benchmark, split in itertools.product(both, one.record["data"]["images"]):
        keys = [key for key in shared if key[:2] == (benchmark.name, split)]
        if not keys:
            continue
        first, second = (run.tallies(benchmark, keys) for run in (one, two))
        changes = {part: _change(first[part], second[part]) for part in first}
        result.setdefault(benchmark.name, {})[split] = changes.get("", changes)
    return result | {"warnings": list(_warnings(result, both))}


def _change(before: Tally, after: Tally) -> dict[str, Any]:
    """Differences in pairs; intervals over samples as the scorer draws them, McNemar's test over
    answers.

    `n` counts the answers where each is right or wrong, else the samples.
    """
    change: dict[str, Any] = paired(before.counts, after.counts, before.ratios)
    if before.right is None or after.right is None:
        return {"n": len(next(iter(before.counts.values()))), **change}
    return {"n": len(before.right), **change, "mcnemar": mcnemar(before.right, after.right)}


def mcnemar(before: Numbers, after: Numbers) -> dict[str, Any]:
    """The exact test of McNemar (1947): right answers `[questions]` (1 or 0) of two runs.

    Under the null hypothesis an answer that changed sides is as likely to have turned right as
    wrong; `p` is two-sided. Questions count as independent, which those about one image are not
    quite: the interval over images is the safer guide.
    """
    better = int(((before == 0) & (after == 1)).sum())
    worse = int(((before == 1) & (after == 0)).sum())
    changed = better + worse
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1))
    return {"turned_right": better, "turned_wrong": worse, "p": min(1.0, 2 * tail / 2**changed)}


def _warnings(result: Mapping[str, Any], benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    """Warnings where a measure fell together with what lowers it for free."""
    for benchmark, split, _, part in _parts(result, benchmarks):
        measures = [(m, part[key]) for key, m in benchmark.measures.items() if key in part]
        fallen = [m for m, change in measures if m.free and change["difference"] < 0]
        paid = [m.cost for m, change in measures if m.cost and _got_worse(m, change)]
        if fallen and paid:
            name, cure = fallen[0].free, fallen[0].cure
            yield (
                f"{benchmark.name if split == ALL else split}: {name} fell while "
                f"{' and '.join(paid)}; captions that say less lower {name} for free{cure}"
            )


def _got_worse(measure: Measure, change: Mapping[str, Any]) -> bool:
    """For certain: the whole interval lies on the worse side; a length is worse when shorter."""
    low, high = change["interval"]
    return bool(low > 0 if measure.direction < 0 else high < 0)


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as a table with its warnings."""
    names = [Path(result[key]).name for key in ("before", "after")]
    if names[0] == names[1]:
        names = [result["before"], result["after"]]
    header = ["split", "measure", *names, "difference", "McNemar"]
    notes = [f"- {text}\n" for text in result["warnings"]]
    if result["unpaired"]:
        notes.append(f"- {result['unpaired']} samples were skipped by one of the runs: left out\n")
    return (
        f"{names[1]} minus {names[0]} on the same images, in percent points (lengths: tokens or "
        f"words; scores: points). In brackets 95 % paired bootstrap intervals; * where 0 lies "
        f"outside.\n\n"
        f"{table.layout(header, list(_cells(result)))}\n\n{''.join(notes)}"
    )


def _cells(result: Mapping[str, Any]) -> Iterator[list[str]]:
    records = [RunFolder(Path(result[key])).record() for key in ("before", "after")]
    for benchmark, split, part, changes in _parts(result, _benchmarks(*records)):
        for key, measure in benchmark.measures.items():
            if key in changes:
                test = _test_cell(changes) if measure.right and "mcnemar" in changes else ""
                label = benchmark.label(part, key)
                yield [split, label, *_numbers(measure, changes[key]), test]


def _benchmarks(*records: Mapping[str, Any]) -> list[Benchmark]:
    """The benchmarks of any of these runs."""
    return [*registry.requested(task for r in records for task in r["settings"]["tasks"]).values()]


def _parts(
    result: Mapping[str, Any], benchmarks: Sequence[Benchmark]
) -> Iterator[tuple[Benchmark, str, str, Mapping[str, Any]]]:
    """(benchmark, split, part, changes); the part is "" where a benchmark has none."""
    for benchmark in benchmarks:
        for split, parts in result.get(benchmark.name, {}).items():
            for part, changes in ({"": parts} if "n" in parts else parts).items():
                yield benchmark, split, part, changes


def _test_cell(measures: Mapping[str, Any]) -> str:
    test = measures["mcnemar"]
    return f"+{test['turned_right']} -{test['turned_wrong']}, p = {test['p']:.3g}"


def _numbers(measure: Measure, change: Mapping[str, Any]) -> list[str]:
    unit = measure.times
    low, high = (unit * bound for bound in change["interval"])
    star = " *" if low > 0 or high < 0 else ""
    values = [f"{unit * change[name]:.1f}" for name in ("before", "after")]
    return [*values, f"{unit * change['difference']:+.1f} [{low:+.1f}, {high:+.1f}]{star}"]
