"""python -m eval score: score a run folder again, or files that were made elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.registry import BENCHMARKS
from eval.cli import Commands
from eval.cli.function import Command
from eval.reports import table
from eval.runs import runner

SCORES: Mapping[str, Callable[..., Mapping[str, Any]]] = {
    name: benchmark.score_files
    for name, benchmark in BENCHMARKS.items()
    if benchmark.score_files is not None
}


def add(commands: Commands) -> None:
    """Add `score FOLDER` (short for `score run FOLDER`), and `score NAME ...` per benchmark."""
    parser = commands.add_parser(
        "score", help="Score a run folder, or files made elsewhere; no model"
    )
    kinds = parser.add_subparsers(required=True, metavar=f"RUN | {' | '.join(SCORES)}")
    Command(score_run, prints=False).add(kinds, "run")
    for name, function in SCORES.items():
        Command(function).add(kinds, name)


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the `run` that `score FOLDER` leaves out."""
    words = list(arguments)
    if words[:1] == ["score"] and words[1:] and words[1] not in (*SCORES, "run", "-h", "--help"):
        words.insert(1, "run")
    return words


def score_run(folder: Path, /) -> None:
    """Score a run folder again and write its metrics.json.

    folder (RUN): folder of a run
    """
    runner.score(folder)
    print(table.markdown([folder]))
