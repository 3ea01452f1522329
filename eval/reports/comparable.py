"""Whether two runs can be compared: their prompts and their scorers must be the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from eval.benchmarks.base import Benchmark
from eval.benchmarks.intervals import Tally
from eval.errors import EvalError
from eval.runs.config import recorded
from eval.runs.folder import RunFolder, row_key

Lines: TypeAlias = Mapping[tuple[str, ...], Mapping[str, Any]]
RENDERING = ("model", "chat_template")
RESPONSE_KEYS = ("answer", "tokens", "ended")
"""Keys of a row that hold the response, not the question or its facts."""


@dataclass(frozen=True)
class Run:
    """One run.

    path: its folder
    record: the content of config.yaml
    rows: responses by sample
    skipped: samples left out
    """

    path: Path
    record: Mapping[str, Any]
    rows: Lines
    skipped: Lines

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run in a folder; EvalError if it is not complete."""
        folder = RunFolder(path)
        record, rows, skipped = folder.record(), folder.rows(), folder.skipped()
        total = record["data"]["samples"]
        if len(rows) + len(skipped) < total:
            raise EvalError(
                f"{path} is not complete ({len(rows)} of {total} samples are answered): "
                f"run it again to resume, then compare"
            )
        by_key = ({row_key(row): row for row in part} for part in (rows, skipped))
        return cls(path, record, *by_key)

    def samples(self, task: str) -> Lines:
        """All samples of a task, answered or not."""
        both = {**self.rows, **self.skipped}
        return {key: row for key, row in both.items() if key[0] == task}

    def tallies(self, benchmark: Benchmark, keys: Sequence[tuple[str, ...]]) -> Mapping[str, Tally]:
        """What each of these samples adds, by part of the benchmark."""
        rows = [self.rows[key] for key in keys]
        return benchmark.tallies(rows, recorded(self.record, benchmark), self.path)

    def reader(self, benchmark: Benchmark) -> str:
        """What reads its responses to the benchmark."""
        return benchmark.reader(recorded(self.record, benchmark), self.path)


def obstacles(one: Run, two: Run, both: Sequence[Benchmark]) -> Iterator[str]:
    """Every difference between the two runs that makes them incomparable."""
    if not both:
        yield "they have no task in common"
    if one.record.get("decoding") != two.record.get("decoding"):
        yield f"decoding is {one.record.get('decoding')} and {two.record.get('decoding')}"
    rendering = [[run.record["settings"].get(key) for key in RENDERING] for run in (one, two)]
    if rendering[0][0] == rendering[1][0] and rendering[0] != rendering[1]:
        templates = f"{rendering[0][1]!r} and {rendering[1][1]!r}"
        yield f"the prompts are rendered by chat_template {templates}"
    for benchmark in both:
        task = benchmark.name
        mine, others = (run.record["settings"][task] for run in (one, two))
        if mine["max_new_tokens"] != others["max_new_tokens"]:
            limits = f"{mine['max_new_tokens']} and {others['max_new_tokens']} tokens"
            yield f"the token limit of {task} is {limits}"
        yield from _other_samples(one.samples(task), two.samples(task), task)
        readers = [run.reader(benchmark) for run in (one, two)]
        if readers[0] != readers[1]:
            yield f"{task} is read by {readers[0]} and by {readers[1]}"


def _other_samples(mine: Lines, others: Lines, task: str) -> Iterator[str]:
    images = [{(key[1], row["image"]) for key, row in rows.items()} for rows in (mine, others)]
    if images[0] != images[1]:
        sizes = f"{len(images[0])} and {len(images[1])}"
        yield f"the images of {task} differ ({sizes}, {len(images[0] & images[1])} in common)"
        return
    answered = [key for key in mine.keys() & others.keys() if "prompt" in mine[key]]
    answered = [key for key in answered if "prompt" in others[key]]
    prompts = [(mine[key]["prompt"], others[key]["prompt"]) for key in sorted(answered)]
    differing = next((pair for pair in prompts if pair[0] != pair[1]), None)
    if mine.keys() != others.keys() or differing:
        yield f"the prompts of {task} differ" + (
            f", for example {differing[0]!r} and {differing[1]!r}" if differing else ""
        )
    elif any(_facts(mine[key]) != _facts(others[key]) for key in answered):
        yield f"the annotations behind {task} differ"


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """The question, and the truth that scores its response."""
    return {key: value for key, value in row.items() if key not in RESPONSE_KEYS}
