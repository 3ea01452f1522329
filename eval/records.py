"""Rows of somebody's JSON file, each of which knows its place, for error messages that name it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.errors import EvalError


@dataclass(frozen=True)
class Row:
    """One JSON object of a file. `where` reads like "answers.jsonl, line 7"."""

    where: str
    fields: Mapping[str, Any]

    def has(self, *names: str) -> bool:
        return any(name in self.fields for name in names)

    def first(self, *names: str) -> Any:
        """Value of the first of these fields that is there; `EvalError` if none is."""
        for name in names:
            if name in self.fields:
                return self.fields[name]
        raise EvalError(
            f"{self.where}: no field {_either(names)}; found {', '.join(self.fields) or 'none'}."
        )

    def text(self, *names: str) -> str:
        """Like `first`, for a field that must be a string."""
        value = self.first(*names)
        if not isinstance(value, str):
            raise EvalError(
                f"{self.where}: the field {_either(names)} is {type(value).__name__} ({value!r}); "
                "expected a string."
            )
        return value

    def texts(self, name: str) -> list[str]:
        """A field that must be a list of strings."""
        value = self.first(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise EvalError(f"{self.where}: the field {name!r} is {value!r}; expected strings.")
        return value

    def number(self, *names: str) -> int:
        """Like `first`, for a whole number, also where it is written as a string."""
        value = self.first(*names)
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise EvalError(
                f"{self.where}: the field {_either(names)} is {value!r}; expected a whole number."
            )
        return value


def read_text(path: Path) -> str:
    """Content of a UTF-8 file; `EvalError` where there is none or it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise EvalError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot be read as UTF-8 text: {error}.") from error
    if not text.strip():
        raise EvalError(f"{path}: the file is empty.")
    return text


def read_json(path: Path) -> Any:
    """The one JSON value of a file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise EvalError(f"{path}, line {error.lineno}: broken JSON ({error.msg}).") from error


def read_rows(path: Path) -> list[Row]:
    """Objects of a JSON list, of JSON lines, or of the `{"imgToEval": {...}}` form.

    In the last form an object without `image_id` takes its key for one.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = [_row(f"{path}, entry {n}", value) for n, value in enumerate(read_json(path), 1)]
    elif (evaluated := _evaluated(text)) is not None:
        rows = [_row(f"{path}, imgToEval[{key!r}]", value) for key, value in evaluated.items()]
        keys = zip(evaluated, rows, strict=True)
        rows = [Row(row.where, {"image_id": key, **row.fields}) for key, row in keys]
    else:
        rows = [
            _line(f"{path}, line {number}", line)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    if not rows:
        raise EvalError(f"{path}: the file holds no rows.")
    return rows


def _evaluated(text: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    inner = value.get("imgToEval") if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else None


def _line(where: str, line: str) -> Row:
    try:
        return _row(where, json.loads(line))
    except json.JSONDecodeError as error:
        raise EvalError(
            f"{where}: broken JSON ({error.msg}, column {error.colno}). Expected a JSON list, or "
            "one JSON object a line; a half-written last line can be deleted."
        ) from error


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise EvalError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return Row(where, value)


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
