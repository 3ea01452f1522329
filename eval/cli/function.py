"""A function as a command: its options are its arguments.

`truth_file` is `--truth-file`, its type and default are the function's, and what it means is a line
`truth_file (METAVAR): meaning` of the function's docstring. Arguments that Python takes by position
only have no dashes; one that is a dataclass stands for its fields. What is not given is left to the
function's own default.
"""

import argparse
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
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
        for name, settings in _options(self.function):
            parser.add_argument(name, **settings)
        if self.prints:
            parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(command=self)

    def __call__(self, given: argparse.Namespace) -> None:
        result = _called(self.function, given)
        if self.prints:
            print_result(result, given.json)


def _options(function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of every argument for argparse."""
    meanings = _meanings(function)
    hints = typing.get_type_hints(function.__init__ if is_dataclass(function) else function)
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            yield from _options(hints[name])
            continue
        settings = _settings(hints[name], parameter.default, *meanings[name])
        if parameter.kind is parameter.POSITIONAL_ONLY:
            yield name, settings
        else:
            needed = parameter.default is parameter.empty
            # `all_` is `--all`: an argument does not hide a name of Python's
            option = f"--{name.rstrip('_').replace('_', '-')}"
            yield option, {"dest": name, "required": needed, **settings}


def _meanings(function: Callable[..., Any]) -> dict[str, tuple[str | None, str]]:
    """Metavar and meaning of every argument, those of base classes too."""
    owners = reversed(inspect.getmro(function)) if isinstance(function, type) else [function]
    lines = [line for owner in owners for line in str(inspect.getdoc(owner)).splitlines()]
    matches = [match.groups() for line in lines if (match := _MEANING.fullmatch(line))]
    return {name: (metavar, meaning) for name, metavar, meaning in matches}


def _called(function: Callable[..., Any], given: argparse.Namespace) -> Any:
    """What the function returns for these arguments."""
    hints = typing.get_type_hints(function.__init__ if is_dataclass(function) else function)
    first, more = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        group = hints[name] if is_dataclass(hints[name]) else None
        value = getattr(given, name) if group is None else _called(group, given)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            first.append(value)
        elif value is not None:
            more[name] = value
    return function(*first, **more)


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
