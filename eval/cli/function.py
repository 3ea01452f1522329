"""A function as a command: its options are its arguments.

`truth_file` is `--truth-file`, its type and default are the function's, and what it means is a line
`truth_file (METAVAR): meaning` of the function's docstring. One that is not given is left to the
function's own default.
"""

import argparse
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

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
        found = [match.groups() for line in lines if (match := _MEANING.fullmatch(line))]
        meanings = {name: (metavar, meaning) for name, metavar, meaning in found}
        hints = typing.get_type_hints(self.function)
        for name, parameter in inspect.signature(self.function).parameters.items():
            yield name, _settings(hints[name], parameter.default, *meanings[name])

    def __call__(self, given: argparse.Namespace) -> None:
        names = inspect.signature(self.function).parameters
        values = {name: getattr(given, name) for name in names}
        result = self.function(**{k: v for k, v in values.items() if v is not None})
        if self.prints:
            print_result(result, given.json)


def _settings(hint: Any, default: Any, metavar: str | None, meaning: str) -> dict[str, Any]:
    """What argparse is told of one argument; the function itself refuses names it does not list."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not NoneType]
    if hint is bool:
        return {"action": "store_const", "const": True, "help": meaning}
    if typing.get_origin(hint) is typing.Literal:
        return {"metavar": "|".join(kinds), "help": f"{meaning} (default: {default})"}
    kind = kinds[0] if kinds else hint
    told = f"{meaning} (default: {default})" if kind is int else meaning
    needed = default is inspect.Parameter.empty
    return {"type": kind, "metavar": metavar, "required": needed, "help": told}


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
