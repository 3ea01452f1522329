"""Checks of values that people write in YAML or on the command line."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.errors import EvalError

WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "nothing (null)",
    tuple: "a list of names",
    list: "a list",
    dict: "a section (key: value lines)",
}


def check_section(name: str, section: Any, schema: type) -> dict[str, Any]:
    """The values of one section, checked against the fields of the dataclass `schema`."""
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise EvalError(f"{name}: expected {WORDS[dict]}, found {describe(section)}")
    hints = typing.get_type_hints(schema)
    names = [f.name for f in dataclasses.fields(schema) if f.init]
    for key in section:
        if key not in names:
            raise EvalError(unknown(f"key in section {name}", key, names))
    return {key: check(f"{name}.{key}", value, hints[key]) for key, value in section.items()}


def check(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` says: lists and numbers written as text (1e-3) are converted.

    Names are checked where the type lists them. Types that are not plain pass as they are; whoever
    owns them checks them.
    """
    if names := _names(hint):
        found = check(key, value, _unnamed(hint))
        if found is not None:
            check_names(key, found if isinstance(found, tuple) else (found,), names)
        return found
    kinds = _kinds(hint)
    if kinds is None:
        return tuple(value) if isinstance(value, list) else value
    if type(value) in kinds:
        return value
    if tuple in kinds and isinstance(value, list) and all(type(item) is str for item in value):
        return tuple(value)
    if float in kinds and type(value) in (int, str):
        try:
            return float(value)
        except ValueError:
            pass
    expected = " or ".join(WORDS[kind] for kind in kinds)
    raise EvalError(f"{key}: expected {expected}, found {describe(value)}")


def _names(hint: Any) -> tuple[str, ...]:
    """The names that a Literal lists, also where it is one of several types or fills a tuple."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return parts
    return tuple(name for part in parts for name in _names(part))


def _unnamed(hint: Any) -> Any:
    """The type without its names: a list of texts, or a text."""
    if typing.get_origin(hint) is tuple:
        return tuple[str, ...]
    return str | None if type(None) in typing.get_args(hint) else str


def _kinds(hint: Any) -> tuple[type, ...] | None:
    """The plain types that a hint allows, or None where one of them is not plain."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [_kinds(part) for part in typing.get_args(hint)]
        return None if None in parts else tuple(kind for part in parts if part for kind in part)
    if hint == tuple[str, ...]:
        return (tuple,)
    return (hint,) if hint in (bool, int, float, str, type(None)) else None


def describe(value: Any) -> str:
    """A value and what kind of thing it is."""
    return f"{value!r} ({WORDS.get(type(value), type(value).__name__)})"


def unknown(what: str, key: Any, known: Iterable[str]) -> str:
    """The message for a key that nobody knows, with the nearest one that is known."""
    names = list(known)
    close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what}: {key}; {hint}Known: {', '.join(names)}"


def check_names(key: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Every name must be known, and stand once."""
    known = list(known)
    for place, name in enumerate(names):
        if name not in known:
            raise EvalError(unknown(f"name in {key}", name, known))
        if name in names[:place]:
            raise EvalError(f"{key} names {name} twice")


def check_positive(section: str, owner: Any, *keys: str) -> None:
    """Counts must be at least 1 where they are given."""
    for key in keys:
        value = getattr(owner, key, None)
        if isinstance(value, int) and value < 1:
            name = f"{section}.{key}" if section else key
            raise EvalError(f"{name}: expected an integer of at least 1, found {value}")
