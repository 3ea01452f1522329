"""Runs side by side: the measures that are compared, and the notes that a reader needs.

CHAIR never stands alone: recall, length, repetition and silence are the rows below it, since
shorter, looping or empty captions lower CHAIR for free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import alarm, tasks
from eval.benchmarks.chair import LENGTHS
from eval.errors import EvalError
from eval.runs.folder import RunFolder
from eval.runs.samples import notice

CHAIR_ROWS = {
    "chair_s": "CHAIR_S %",
    "chair_i": "CHAIR_I %",
    "chair_i_distinct": "CHAIR_I %, each object once",
    **{f"chair_s_at_{n}": f"CHAIR_S %, first {n} words" for n in LENGTHS},
    **{f"chair_i_at_{n}": f"CHAIR_I %, first {n} words" for n in LENGTHS},
    "recall": "recall %",
    "precision": "precision %",
    "f1": "F1 %",
    "mean_tokens": "length in tokens",
    "distinct_4gram_share": "distinct 4-grams %",
    "looping_share": "looping %",
    "no_object_share": "naming no object %",
}
POPE_ROWS = {"accuracy": "accuracy %", "f1": "F1 %", "yes_ratio": "answered yes %"}
ALARM = "degeneration alarm"


@dataclass(frozen=True)
class Value:
    """One measured number (shares in [0, 1], lengths in tokens) with its interval, of n samples."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Row:
    """One measure of all runs; None where a run does not have it."""

    split: str
    key: str
    label: str
    values: Sequence[Value | None]


@dataclass(frozen=True)
class Column:
    """One run.

    name: its heading in the table. record: the content of config.yaml. metrics: of metrics.json.
    """

    name: str
    record: Mapping[str, Any]
    metrics: Mapping[str, Any]


def markdown(folders: Sequence[Path]) -> str:
    """The table of these run folders with notes below it."""
    columns = read(folders)
    header = ["split", "measure", *(column.name for column in columns)]
    below = "".join(f"\n- {note}" for note in notes(columns))
    return f"{heading(columns)}\n\n{layout(header, lines(columns))}\n{below}\n"


def lines(columns: Sequence[Column]) -> list[list[str]]:
    """The cells of the table, one row of numbers a line, each split headed by its alarms."""
    lines: list[list[str]] = []
    shown: set[str] = set()
    for row in rows(columns):
        if row.key in CHAIR_ROWS and row.split not in shown:
            lines.append(
                [
                    row.split,
                    ALARM,
                    *(
                        alarm_cell(column.metrics.get("chair", {}).get(row.split))
                        for column in columns
                    ),
                ]
            )
            shown.add(row.split)
        lines.append([row.split, row.label, *(cell(row.key, value) for value in row.values)])
    return lines


def alarm_cell(score: Mapping[str, Any] | None) -> str:
    """The alarms of a split whose captions were scored."""
    return "-" if score is None else ", ".join(alarm.ringing(score)).upper() or "no"


def cell(key: str, value: Value | None) -> str:
    """A value with its interval: shares in percent, lengths as they are."""
    if value is None:
        return "-"
    times = unit(key)
    return f"{times * value.value:.1f} [{times * value.low:.1f}, {times * value.high:.1f}]"


def unit(key: str) -> int:
    """The factor by which a measure is shown: shares are shown in percent."""
    return 1 if key.endswith(("mean_tokens", "mean_words", " score")) or key == "score" else 100


def label(name: str, key: str) -> str:
    """The name, in a table, of a measure of one part of a benchmark."""
    return f"{name}, {key}" + (" %" if unit(key) == 100 else "")


def read(folders: Sequence[Path]) -> list[Column]:
    """The runs, named by their folders (by full paths where two folders share a name).

    Paths that are no scored runs (`runs/*` also names pictures, and runs that have only begun) are
    left out and named.
    """
    if not folders:
        raise EvalError("no run folder given, for example: python -m eval table runs/*")
    beside = [path for path in folders if path.exists() and not RunFolder(path).metrics.exists()]
    if 0 < len(beside) < len(folders):
        notice(f"no scored run, left out: {', '.join(map(str, beside))}")
        folders = [path for path in folders if path not in beside]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [_column(name, RunFolder(folder)) for name, folder in zip(names, folders, strict=True)]


def _column(name: str, folder: RunFolder) -> Column:
    record = folder.record()
    try:
        metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise EvalError(
            f"{folder.path} has no readable metrics.json: python -m eval score {folder.path}"
        ) from None
    for score in metrics.get("chair", {}).values():
        if not {*CHAIR_ROWS, "alarms"} <= score.keys():
            raise EvalError(
                f"{folder.metrics} was written by an older version and lacks measures: "
                f"python -m eval score {folder.path}"
            )
    return Column(name, record, metrics)


def rows(columns: Sequence[Column]) -> Iterator[Row]:
    """One row a split and measure that at least one run has."""
    for split in splits(columns):
        scores = [column.metrics.get("chair", {}).get(split) for column in columns]
        if any(scores):
            for key, label in CHAIR_ROWS.items():
                yield Row(split, key, label, [value(score, key) for score in scores])
        for strategy in strategies(columns, split):
            scores = [
                column.metrics.get("pope", {}).get(split, {}).get(strategy) for column in columns
            ]
            for key, label in POPE_ROWS.items():
                name, shown = f"pope_{strategy}_{key}", f"POPE {strategy}, {label}"
                yield Row(split, name, shown, [value(score, key) for score in scores])
    yield from _other_rows(columns)


def _other_rows(columns: Sequence[Column]) -> Iterator[Row]:
    """One row a measure with an interval of every other benchmark."""
    by_column = [dict(_other_scores(column)) for column in columns]
    for name in dict.fromkeys(name for scores in by_column for name in scores):
        scores = [each.get(name) for each in by_column]
        keys = [key for score in scores if score for key in score["intervals"]]
        for key in dict.fromkeys(keys):
            values = [value(score, key) for score in scores]
            yield Row(tasks.SPLIT, f"{name} {key}", label(name, key), values)


def _other_scores(column: Column) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for task in tasks.TASKS:
        yield from tasks.measures(column.metrics.get(task, {}).get(tasks.SPLIT, {}), task)


def value(score: Mapping[str, Any] | None, key: str) -> Value | None:
    """A measure of one scored split; None where it was not scored."""
    if score is None:
        return None
    low, high = score["intervals"][key]
    return Value(score[key], low, high, score["n"])


def splits(columns: Sequence[Column]) -> list[str]:
    """The splits of these runs, in their order."""
    return list(
        dict.fromkeys(split for column in columns for split in column.record["data"]["images"])
    )


def strategies(columns: Sequence[Column], split: str) -> list[str]:
    """The POPE strategies that were scored on a split, in the order of the configurations."""
    requested = [column.record["settings"]["pope"]["strategies"] for column in columns]
    scored = [column.metrics.get("pope", {}).get(split, {}) for column in columns]
    pairs = zip(requested, scored, strict=True)
    return list(dict.fromkeys(name for names, scores in pairs for name in names if name in scores))


def heading(columns: Sequence[Column]) -> str:
    """What the table shows, and which way is better."""
    models, data = (
        ", ".join(dict.fromkeys(str(column.record["settings"][key]) for column in columns))
        for key in ("model", "data")
    )
    return (
        f"Model {models}, data {data}. In brackets 95 % bootstrap intervals. Lower is better for "
        f"CHAIR, higher for recall, distinct 4-grams, accuracy and F1."
    )


def notes(columns: Sequence[Column]) -> Iterator[str]:
    """The sizes of the samples, and every reason to trust a number less."""
    for split in splits(columns):
        sizes = dict.fromkeys(_size(column, split) for column in columns)
        yield f"{split}: {' or '.join(sizes)}"
        images = [column.record["data"]["images"].get(split) for column in columns]
        if len({entry["sha256"] for entry in images if entry}) > 1:
            yield f"{split}: the runs used different images, so their columns cannot be compared"
    runs_by_note: dict[str, list[str]] = {}
    for column in columns:
        for note in _column_notes(column):
            runs_by_note.setdefault(note, []).append(column.name)
    for note, names in runs_by_note.items():
        yield f"{', '.join(names)}: {note}"


def _size(column: Column, split: str) -> str:
    captions = column.metrics.get("chair", {}).get(split)
    questions = column.metrics.get("pope", {}).get(split, {})
    parts = [f"{captions['counts']['captions']} captions"] if captions else []
    parts += [
        f"{count} questions a POPE strategy"
        for count in dict.fromkeys(score["questions"] for score in questions.values())
    ]
    others = [task for task in tasks.TASKS if split in column.metrics.get(task, {})]
    return ", ".join([*parts, *others]) or "nothing answered"


def _column_notes(column: Column) -> Iterator[str]:
    answered, samples = column.metrics["answered"], column.metrics["samples"]
    if skipped := column.metrics.get("skipped", 0):
        yield f"{skipped} of {samples} samples skipped, see skipped.jsonl"
    if answered + skipped < samples:
        yield f"incomplete, {answered} of {samples} samples are answered"
    yield from column.record["notes"]
    if len(column.record["environments"]) > 1:
        yield "answers made by different versions, see config.yaml"
    if len(column.record["patches"]) > 1:
        yield "the patch described itself differently when the run was resumed, see config.yaml"
    for split, score in column.metrics.get("chair", {}).items():
        yield from (f"{split}, {text}" for text in [*score["alarms"], *score["flags"]])
        if (cut := 1 - score["ended_share"]) > 0:
            yield f"{split}: {100 * cut:.1f} % of the captions were cut by the token limit"
    for name, score in _other_scores(column):
        yield from (f"{name}, {flag}" for flag in score.get("flags", ()))
    for split, scores in column.metrics.get("pope", {}).items():
        for strategy, score in scores.items():
            yield from (f"{split}, POPE {strategy}, {flag}" for flag in score["flags"])
            if (share := score["unreadable"]) > 0:
                yield f"{split}, POPE {strategy}: {100 * share:.1f} % of answers are unreadable"
            if score["parser"] != "official":
                yield f"{split}, POPE {strategy}: answers are read by the {score['parser']} parser"


def layout(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with columns padded to one width, readable as plain text."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )
