"""A function as a command: its options are its arguments.

`truth_file` is `--truth-file`, its type and default are the function's, and what it means is a line
`truth_file (METAVAR): meaning` of the function's docstring. Arguments that Python takes by position
only have no dashes. One that is not given is left to the function's own default.
"""

import argparse
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any

from eval.cli import Commands

_MEANING = re.compile(r"(\w+)(?: \(([^)]+)\))?: (.+)")


@dataclass(frozen=True)
class Command:
    """A function as a command: its options, and the call.

    function: what the command does
    prints: whether the function's result is printed; else it prints what is to be seen
    """

    function: Callable[..., Any]
    prints: bool = True

    @property
    def help(self) -> str:
        """The first line of the docstring."""
        return str(inspect.getdoc(self.function)).partition("\n")[0].removesuffix(".")

    def add(self, commands: Commands, name: str = "") -> None:
        """Add the command, which is called like its function unless `name` says otherwise."""
        self.add_options(commands.add_parser(name or self.function.__name__, help=self.help))

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        for name, settings in self._options():
            parser.add_argument(name, **settings)
        if self.prints:
            parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(command=self)

    def _options(self) -> Iterator[tuple[str, dict[str, Any]]]:
        lines = str(inspect.getdoc(self.function)).splitlines()
        found = [match.groups() for line in lines if (match := _MEANING.fullmatch(line))]
        meanings = {name: (metavar, meaning) for name, metavar, meaning in found}
        hints = typing.get_type_hints(self.function)
        for name, parameter in inspect.signature(self.function).parameters.items():
            settings = _settings(hints[name], parameter.default, *meanings[name])
            if parameter.kind is parameter.POSITIONAL_ONLY:
                yield name, settings
            else:
                needed = parameter.default is parameter.empty
                # `all_` is `--all`: an argument does not hide a name of Python's
                option = f"--{name.rstrip('_').replace('_', '-')}"
                yield option, {"dest": name, "required": needed, **settings}

    def __call__(self, given: argparse.Namespace) -> None:
        parameters = inspect.signature(self.function).parameters.values()
        values = {each.name: getattr(given, each.name) for each in parameters}
        first = [values.pop(it.name) for it in parameters if it.kind is it.POSITIONAL_ONLY]
        result = self.function(*first, **{k: v for k, v in values.items() if v is not None})
        if self.prints:
            print_result(result, given.json)


def _settings(hint: Any, default: Any, metavar: str | None, meaning: str) -> dict[str, Any]:
    """What argparse needs to know of one argument; the function refuses names it does not list."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not NoneType)
    if hint is bool:
        return {"action": "store_const", "const": True, "help": meaning}
    if typing.get_origin(hint) is typing.Literal:
        names = "|".join(typing.get_args(hint))
        return {"metavar": names, "help": f"{meaning} (default: {default})"}
    if typing.get_origin(hint) is list:
        several = {"action": "append"} if default is None else {"nargs": "+"}
        return {"type": typing.get_args(hint)[0], "metavar": metavar, "help": meaning, **several}
    shown = f"{meaning} (default: {default})" if type(default) is int else meaning
    return {"type": hint, "metavar": metavar, "help": shown}


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
