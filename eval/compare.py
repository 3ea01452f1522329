"""Two runs on the same images, sample by sample: differences in pairs, and what they are worth.

A difference of two means on the same images is far less noisy than either mean; intervals come from
drawing images and taking the difference on the drawn ones. Runs that were asked different things
are refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import chair, pope, runs, table
from eval.comparable import Run, obstacles
from eval.errors import EvalError
from eval.intervals import Numbers, paired

# measure: the direction that lowers CHAIR for free, and what to call it
FREE_GAINS = {
    "recall": (-1, "recall went down"),
    "mean_tokens": (-1, "captions got shorter"),
    "looping_share": (1, "more captions repeat themselves"),
    "no_object_share": (1, "more captions name nothing"),
}


def compare(before: Path, after: Path) -> dict[str, Any]:
    """What changed from one run to the other, as one JSON-able dictionary; shares lie in [0, 1].

    Per measure the two values, `difference` (after minus before) and its 95 % `interval`, over the
    samples that both answered. EvalError says why two runs cannot be compared.
    """
    one, two = Run.read(before), Run.read(after)
    tasks = [task for task in ("chair", "pope") if one.asked(task) and two.asked(task)]
    if reasons := list(obstacles(one, two, tasks)):
        raise EvalError(f"{before} and {after} cannot be compared: {'; '.join(reasons)}")
    result: dict[str, Any] = {"before": str(before), "after": str(after)}
    shared = sorted(one.rows.keys() & two.rows.keys())
    result["unpaired"] = len(one.rows.keys() ^ two.rows.keys())
    for task, split in itertools.product(tasks, one.record["data"]["images"]):
        keys = [key for key in shared if key[:2] == (task, split)]
        if not keys:
            continue
        pairs = [one.rows[key] for key in keys], [two.rows[key] for key in keys]
        found = _chair(one, *pairs) if task == "chair" else _pope(*pairs)
        result.setdefault(task, {})[split] = found
    return result | {"warnings": list(_warnings(result))}


def _chair(
    run: Run, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    truth = {int(row["image_id"]): row["truth"] for row in before}
    vocabulary = runs.vocabulary(run.path, run.record)
    one, two = (
        chair.counts_by_caption(
            [(int(row["image_id"]), str(row["answer"])) for row in rows], truth, vocabulary
        )
        for rows in (before, after)
    )
    return {"n": len(before), **paired(one, two, chair.ratios)}


def _pope(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """By strategy; intervals over images, McNemar's test over questions."""
    found: dict[str, Any] = {}
    for strategy in pope.STRATEGIES:
        if strategy not in {row["strategy"] for row in before}:
            continue
        rows = [[row for row in part if row["strategy"] == strategy] for part in (before, after)]
        labels, images = ([row[key] for row in rows[0]] for key in ("label", "image"))
        one, two = (
            pope.counts_by_question([row["answer"] for row in part], labels) for part in rows
        )
        by_image = [
            {name: pope.by_image(column, images) for name, column in columns.items()}
            for columns in (one, two)
        ]
        test = mcnemar(one["tp"] + one["tn"], two["tp"] + two["tn"])
        found[strategy] = {
            "n": len(labels),
            **paired(by_image[0], by_image[1], pope.ratios),
            "mcnemar": test,
        }
    return found


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
    """Where a lower CHAIR comes with what lowers it for free."""
    for split, found in result.get("chair", {}).items():
        fallen = [key for key in ("chair_s", "chair_i") if found[key]["difference"] < 0]
        paid = [
            name
            for key, (sign, name) in FREE_GAINS.items()
            if sign * found[key]["interval"][sign < 0] > 0
        ]
        if fallen and paid:
            yield (
                f"{split}: CHAIR fell while {' and '.join(paid)}; captions that say less lower "
                f"CHAIR for free, so look at it at the first 40, 60 and 100 words"
            )


def markdown(found: Mapping[str, Any]) -> str:
    """The comparison as a table with its warnings."""
    names = [Path(found[key]).name for key in ("before", "after")]
    if names[0] == names[1]:
        names = [found["before"], found["after"]]
    header = ["split", "measure", *names, "difference", "McNemar"]
    notes = [f"- {text}\n" for text in found["warnings"]]
    if found["unpaired"]:
        notes.append(f"- {found['unpaired']} samples were skipped by one of the runs: left out\n")
    return (
        f"{names[1]} minus {names[0]} on the same images, in percent points (length: tokens). In "
        f"brackets 95 % paired bootstrap intervals; * where 0 lies outside.\n\n"
        f"{table.layout(header, list(_cells(found)))}\n\n{''.join(notes)}"
    )


def _cells(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for split, measures in found.get("chair", {}).items():
        for key, label in table.CHAIR_ROWS.items():
            yield [split, label, *_numbers(key, measures[key]), ""]
    for split, strategies in found.get("pope", {}).items():
        for strategy, measures in strategies.items():
            test = measures["mcnemar"]
            for key, label in table.POPE_ROWS.items():
                said = f"+{test['turned_right']} -{test['turned_wrong']}, p = {test['p']:.3g}"
                shown = f"POPE {strategy}, {label}"
                yield [
                    split,
                    shown,
                    *_numbers(key, measures[key]),
                    said if key == "accuracy" else "",
                ]


def _numbers(key: str, change: Mapping[str, Any]) -> list[str]:
    unit = 1 if key == "mean_tokens" else 100
    low, high = (unit * bound for bound in change["interval"])
    star = " *" if low > 0 or high < 0 else ""
    values = [f"{unit * change[name]:.1f}" for name in ("before", "after")]
    return [*values, f"{unit * change['difference']:+.1f} [{low:+.1f}, {high:+.1f}]{star}"]
