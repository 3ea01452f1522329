"""python -m eval score, and the commands that a benchmark adds.

The options of a benchmark's command are the arguments of its function: `truth_file` is
`--truth-file`, its type and default are the function's, and what it means is a line
`truth_file (METAVAR): meaning` of the function's docstring. Without it the function's own default
holds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from eval.benchmarks.registry import BENCHMARKS
from eval.cli import Commands
from eval.reports import table
from eval.runs import runner

SCORES: Mapping[str, Callable[..., Mapping[str, Any]]] = {
    name: benchmark.score_files
    for name, benchmark in BENCHMARKS.items()
    if benchmark.score_files is not None
}
_MEANING = re.compile(r"(\w+)(?: \(([^)]+)\))?: (.+)")


@dataclass(frozen=True)
class Command:
    """A function as a command: its options, and the call."""

    function: Callable[..., Any]
    prints: bool = True

    @property
    def help(self) -> str:
        """The first line of the docstring."""
        return str(inspect.getdoc(self.function)).partition("\n")[0].removesuffix(".")

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        for name, settings in self._options():
            parser.add_argument(f"--{name.replace('_', '-')}", **settings)
        if self.prints:
            parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(command=self)

    def _options(self) -> Iterator[tuple[str, dict[str, Any]]]:
        lines = str(inspect.getdoc(self.function)).splitlines()
        matches = [match.groups() for line in lines if (match := _MEANING.fullmatch(line))]
        meanings = {name: (metavar, meaning) for name, metavar, meaning in matches}
        hints = typing.get_type_hints(self.function)
        for name, parameter in inspect.signature(self.function).parameters.items():
            yield name, _settings(hints[name], parameter.default, *meanings[name])

    def __call__(self, options: argparse.Namespace) -> None:
        names = inspect.signature(self.function).parameters
        values = {name: getattr(options, name) for name in names}
        result = self.function(**{k: v for k, v in values.items() if v is not None})
        if self.prints:
            print_result(result, options.json)


def _settings(hint: Any, default: Any, metavar: str | None, meaning: str) -> dict[str, Any]:
    """The settings of one option; the function itself refuses names that it does not list."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not NoneType]
    if hint is bool:
        return {"action": "store_const", "const": True, "help": meaning}
    if typing.get_origin(hint) is typing.Literal:
        return {"metavar": "|".join(kinds), "help": f"{meaning} (default: {default})"}
    kind = kinds[0] if kinds else hint
    text = f"{meaning} (default: {default})" if kind is int else meaning
    needed = default is inspect.Parameter.empty
    return {"type": kind, "metavar": metavar, "required": needed, "help": text}


def add(commands: Commands) -> None:
    """Add `score FOLDER` (short for `score run FOLDER`), and `score NAME ...` per benchmark."""
    parser = commands.add_parser(
        "score", help="score a run folder, or files made elsewhere; no model"
    )
    kinds = parser.add_subparsers(required=True, metavar=f"RUN | {' | '.join(SCORES)}")
    folder = kinds.add_parser("run", help="score a run folder again and write its metrics.json")
    folder.add_argument("folder", type=Path, metavar="RUN")
    folder.set_defaults(command=score_run)
    add_scores(kinds)


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the `run` that `score FOLDER` leaves out."""
    words = list(arguments)
    if words[:1] == ["score"] and words[1:] and words[1] not in (*SCORES, "run", "-h", "--help"):
        words.insert(1, "run")
    return words


def score_run(options: argparse.Namespace) -> None:
    """Score a run folder again, and print the table."""
    runner.score(options.folder)
    print(table.markdown([options.folder]))


def add_scores(kinds: Commands) -> None:
    """Add `score NAME` for every benchmark to the sub-parsers of `score`."""
    for name, function in SCORES.items():
        command = Command(function)
        command.add_options(kinds.add_parser(name, help=command.help))


def add_commands(commands: Commands) -> None:
    """Add what benchmarks bring along beside scores, such as a maker of questions."""
    for benchmark in BENCHMARKS.values():
        for name, function in benchmark.commands.items():
            command = Command(function, prints=False)
            command.add_options(commands.add_parser(name, help=command.help))


def print_result(result: Mapping[str, Any], as_json: bool = False) -> None:
    """One JSON object, or a line per number with its 95 % interval."""
    print(json.dumps(result, indent=2) if as_json else "\n".join(_lines(result)))


def _lines(result: Mapping[str, Any], indent: str = "") -> list[str]:
    intervals = result.get("intervals", {})
    lines = []
    for name, value in result.items():
        if name == "intervals" or value == []:
            continue
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        elif isinstance(value, list):
            lines += [f"{indent}note: {item}" for item in value]
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            low_high = "  [{:.4f}, {:.4f}]".format(*intervals[name]) if name in intervals else ""
            lines.append(f"{indent}{name:<30} {shown}{low_high}")
    return lines
