"""Runs side by side: the measures that are compared, and the notes that a reader needs.

Which measures there are, what they are called and what is to be said of them is each benchmark's
own matter.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.benchmarks import registry
from eval.benchmarks.base import Benchmark, Measure, Scores
from eval.errors import EvalError, notice
from eval.runs.folder import RunFolder

ALARM = "degeneration alarm"


@dataclass(frozen=True)
class Value:
    """One measured number.

    value: a share in [0, 1], or a length in tokens
    low, high: its 95 % interval
    n: number of samples
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Row:
    """One measure of all runs.

    split, benchmark, part, measure: which one
    values: by run, None where a run does not have it
    """

    split: str
    benchmark: Benchmark
    part: str
    measure: str
    values: Sequence[Value | None]

    @property
    def key(self) -> str:
        return self.benchmark.key(self.part, self.measure)

    @property
    def label(self) -> str:
        return self.benchmark.label(self.part, self.measure)

    @property
    def cells(self) -> list[str]:
        return [cell(self.benchmark.measures[self.measure], value) for value in self.values]


@dataclass(frozen=True)
class Column:
    """One run.

    name: its heading in the table
    record: the content of config.yaml
    metrics: the content of metrics.json
    """

    name: str
    record: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @cached_property
    def benchmarks(self) -> Mapping[str, Benchmark]:
        return registry.requested(self.record["settings"]["tasks"])

    def scores(self, benchmark: Benchmark, split: str) -> Scores | None:
        """The scores of one split; None where it was not scored."""
        scores: Scores | None = self.metrics.get(benchmark.name, {}).get(split)
        return scores


def benchmarks(columns: Sequence[Column]) -> list[Benchmark]:
    """Those that any of the runs requested, in the order of the registry."""
    tasks = (task for column in columns for task in column.record["settings"]["tasks"])
    return [*registry.requested(tasks).values()]


def markdown(folders: Sequence[Path], keys: Collection[str] | None = None) -> str:
    """The table of these run folders with notes below it.

    `keys`: of the rows only these; ALARM is the line of the alarms.
    """
    columns = read(folders)
    header = ["split", "measure", *(column.name for column in columns)]
    below = "".join(f"\n- {note}" for note in notes(columns))
    return f"{heading(columns)}\n\n{layout(header, lines(columns, keys))}\n{below}\n"


def lines(columns: Sequence[Column], keys: Collection[str] | None = None) -> list[list[str]]:
    """The cells of the table, a line a row, each benchmark with alarms headed by them."""
    lines: list[list[str]] = []
    headed: set[tuple[str, str]] = set()
    for row in rows(columns):
        key = (row.split, row.benchmark.name)
        if key not in headed:
            headed.add(key)
            alarms = [
                alarm_cell(row.benchmark, c.scores(row.benchmark, row.split)) for c in columns
            ]
            if {*alarms} != {"-"} and (keys is None or ALARM in keys):
                lines.append([row.split, ALARM, *alarms])
        if keys is None or row.key in keys:
            lines.append([row.split, row.label, *row.cells])
    return lines


def alarm_cell(benchmark: Benchmark, scores: Scores | None) -> str:
    """The alarms of a split; "-" where it has none that could ring."""
    ringing = None if scores is None else benchmark.alarms(scores)
    return "-" if ringing is None else ", ".join(ringing).upper() or "no"


def cell(measure: Measure, value: Value | None) -> str:
    """A value with its interval: shares in percent, all else as it is."""
    if value is None:
        return "-"
    times = measure.times
    return f"{times * value.value:.1f} [{times * value.low:.1f}, {times * value.high:.1f}]"


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
    column = Column(name, record, metrics)
    for benchmark in column.benchmarks.values():
        for scores in metrics.get(benchmark.name, {}).values():
            if not {*benchmark.required} <= scores.keys():
                raise EvalError(
                    f"{folder.metrics} was written by an older version and lacks measures: "
                    f"python -m eval score {folder.path}"
                )
    return column


def rows(columns: Sequence[Column]) -> Iterator[Row]:
    """One row a split, benchmark, part and measure that at least one run has."""
    for split in splits(columns):
        for benchmark in benchmarks(columns):
            by_column = [
                benchmark.parts(column.scores(benchmark, split) or {}) for column in columns
            ]
            for part in dict.fromkeys(part for parts in by_column for part in parts):
                scores = [parts.get(part) for parts in by_column]
                for key in benchmark.measures:
                    values = [value(each, key) for each in scores]
                    if any(values):
                        yield Row(split, benchmark, part, key, values)


def value(scores: Scores | None, key: str) -> Value | None:
    """A measure of one part of a split; None where it was not scored."""
    if scores is None or key not in scores["intervals"]:
        return None
    low, high = scores["intervals"][key]
    return Value(scores[key], low, high, scores["n"])


def splits(columns: Sequence[Column]) -> list[str]:
    """The splits of these runs, in their order."""
    return list(
        dict.fromkeys(split for column in columns for split in column.record["data"]["images"])
    )


def heading(columns: Sequence[Column]) -> str:
    """What the table shows, and which way is better."""
    models, data = (
        ", ".join(dict.fromkeys(str(column.record["settings"][key]) for column in columns))
        for key in ("model", "data")
    )
    text = f"Model {models}, data {data}. In brackets 95 % bootstrap intervals."
    shown = [m for b in benchmarks(columns) for m in b.measures.values() if m.brief]
    lower, higher = (
        ", ".join(dict.fromkeys(m.label.removesuffix(" %") for m in shown if m.direction == way))
        for way in (-1, 1)
    )
    sentences = [f"lower is better for {lower}"] if lower else []
    sentences += [f"higher is better for {higher}"] if higher else []
    return " ".join([text, *(f"{part[0].upper()}{part[1:]}." for part in sentences)])


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
    scored = ((b, column.scores(b, split)) for b in column.benchmarks.values())
    sizes = [benchmark.size(scores) for benchmark, scores in scored if scores]
    return ", ".join(filter(None, sizes)) or "nothing answered"


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
    for benchmark in column.benchmarks.values():
        for split, scores in column.metrics.get(benchmark.name, {}).items():
            yield from benchmark.notes(split, scores)


def layout(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with columns padded to one width, readable as plain text."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )
