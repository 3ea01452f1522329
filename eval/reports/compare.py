"""Two runs on the same images, sample by sample: paired differences and their significance.

A difference of two means on the same images is far less noisy than either mean; intervals come from
resampling the images and taking the difference on each resample. Runs with different prompts are
refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks import chair, pope, tasks
from eval.benchmarks.intervals import Numbers, Tally, paired
from eval.errors import EvalError
from eval.reports import table
from eval.reports.comparable import Run, obstacles
from eval.runs import runner
from eval.runs.config import TASKS

# measure: the direction that lowers CHAIR for free, and its description
FREE_GAINS = {
    "recall": (-1, "recall went down"),
    "cover": (-1, "fewer true words are covered"),
    "mean_tokens": (-1, "captions got shorter"),
    "mean_words": (-1, "descriptions got shorter"),
    "looping_share": (1, "more captions repeat themselves"),
    "no_object_share": (1, "more captions name nothing"),
}
CHAIR = {("chair", ""): ("chair_s", "chair_i"), ("amber", "generative"): ("chair", "hal")}
ACCURACY = ("accuracy", "a_acc")
"""The share of right answers, beside which McNemar's test stands."""


def compare(before: Path, after: Path) -> dict[str, Any]:
    """What changed from one run to the other, as one dictionary for JSON; shares lie in [0, 1].

    Per measure the two values, `difference` (after minus before) and its 95 % `interval`, over the
    samples that both answered. Raises EvalError with the reason where two runs cannot be compared.
    """
    one, two = Run.read(before), Run.read(after)
    both = [task for task in TASKS if one.samples(task) and two.samples(task)]
    if reasons := list(obstacles(one, two, both)):
        raise EvalError(f"{before} and {after} cannot be compared: {'; '.join(reasons)}")
    result: dict[str, Any] = {"before": str(before), "after": str(after)}
    shared = sorted(one.rows.keys() & two.rows.keys())
    result["unpaired"] = len(one.rows.keys() ^ two.rows.keys())
    for task, split in itertools.product(both, one.record["data"]["images"]):
        keys = [key for key in shared if key[:2] == (task, split)]
        if not keys:
            continue
        first, second = (_tallies(run, task, [run.rows[key] for key in keys]) for run in (one, two))
        changes = {part: _change(first[part], second[part]) for part in first}
        result.setdefault(task, {})[split] = changes.get("", changes)
    return result | {"warnings": list(_warnings(result))}


def _tallies(run: Run, task: str, rows: tasks.Rows) -> dict[str, Tally]:
    """The counts of each sample, by part of the task; "" where the task has no parts."""
    if task == "chair":
        truth = {int(row["image_id"]): row["truth"] for row in rows}
        captions = [(int(row["image_id"]), str(row["answer"])) for row in rows]
        words = runner.vocabulary(run.path, run.record)
        return {"": Tally(chair.counts_by_caption(captions, truth, words), chair.ratios)}
    if task == "pope":
        parser = runner.pope_parser(run.record)
        strategies = pope.by_strategy(rows)
        return {part: pope.tally(*columns, parser) for part, columns in strategies.items()}
    return tasks.TASKS[task].tallies(rows, run.path, run.record["settings"][task])


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


def _warnings(result: Mapping[str, Any]) -> Iterator[str]:
    """Warnings where CHAIR fell together with a measure that lowers it for free."""
    for task, split, part, measures in _parts(result):
        watched = CHAIR.get((task, part), ())
        fallen = [key for key in watched if measures[key]["difference"] < 0]
        paid = [
            name
            for key, (sign, name) in FREE_GAINS.items()
            if key in measures and sign * measures[key]["interval"][sign < 0] > 0
        ]
        if fallen and paid:
            cure = ", so look at it at the first 40, 60 and 100 words" if task == "chair" else ""
            yield (
                f"{split if task == 'chair' else task}: CHAIR fell while {' and '.join(paid)}; "
                f"captions that say less lower CHAIR for free{cure}"
            )


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
    for task, split, part, measures in _parts(result):
        for key, label in _rows(task, part, measures):
            test = _test_cell(measures) if key in ACCURACY else ""
            yield [split, label, *_numbers(key, measures[key]), test]


def _parts(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """(task, split, part, measures); the part is "" where a task has none."""
    for task in TASKS:
        for split, parts in result.get(task, {}).items():
            for part, measures in ({"": parts} if "n" in parts else parts).items():
                yield task, split, part, measures


def _rows(task: str, part: str, measures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The measures that are shown, with their names."""
    if task == "chair":
        yield from table.CHAIR_ROWS.items()
    elif task == "pope":
        yield from ((key, f"POPE {part}, {label}") for key, label in table.POPE_ROWS.items())
    else:
        for key in (key for key in measures if key not in ("n", "mcnemar")):
            yield key, table.label(f"{task} {part}".strip(), key)


def _test_cell(measures: Mapping[str, Any]) -> str:
    test = measures["mcnemar"]
    return f"+{test['turned_right']} -{test['turned_wrong']}, p = {test['p']:.3g}"


def _numbers(key: str, change: Mapping[str, Any]) -> list[str]:
    unit = table.unit(key)
    low, high = (unit * bound for bound in change["interval"])
    star = " *" if low > 0 or high < 0 else ""
    values = [f"{unit * change[name]:.1f}" for name in ("before", "after")]
    return [*values, f"{unit * change['difference']:+.1f} [{low:+.1f}, {high:+.1f}]{star}"]
