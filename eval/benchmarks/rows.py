"""Rows of somebody's JSON file, each of which knows its file and line, for error messages."""

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import tables
from eval.errors import EvalError


@dataclass(frozen=True)
class Row:
    """One JSON object of a file.

    where: its file and line, as in "answers.jsonl, line 7"
    fields: the object
    """

    where: str
    fields: Mapping[str, Any]

    def has(self, *names: str) -> bool:
        return any(self._spelled(name) is not None for name in names)

    def _spelled(self, name: str) -> str | None:
        """How the row writes the name of a field: as given, else in other letters ("Index")."""
        if name in self.fields:
            return name
        return next((key for key in self.fields if key.lower() == name.lower()), None)

    def _found(self, names: Sequence[str]) -> str:
        """The first of these names that the row has."""
        return next(name for name in names if self.has(name))

    def first(self, *names: str) -> Any:
        """Value of the first of these fields that is there; `EvalError` if none is."""
        for name in names:
            if (spelled := self._spelled(name)) is not None:
                return self.fields[spelled]
        raise EvalError(
            f"{self.where}: no field {_either(names)}; found {', '.join(self.fields) or 'none'}."
        )

    def text(self, *names: str) -> str:
        """Like `first`, for a field that must be a string."""
        value = self.first(*names)
        if not isinstance(value, str):
            nothing = value is None or (isinstance(value, float) and math.isnan(value))
            cure = ' An answer that is empty is written "".' if nothing else ""
            raise EvalError(
                f"{self.where}: the field {self._found(names)!r} is {type(value).__name__} "
                f"({value!r}); expected a string.{cure}"
            )
        return value

    def texts(self, name: str) -> list[str]:
        """A field that must be a list of strings."""
        value = self.first(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise EvalError(f"{self.where}: the field {name!r} is {value!r}; expected strings.")
        return value

    def number(self, *names: str) -> int:
        """Like `first`, for an integer, also where it is written as a string."""
        value = self.first(*names)
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise EvalError(
                f"{self.where}: the field {_either(names)} is {value!r}; expected an integer."
            )
        return value


def read_text(path: Path) -> str:
    """Content of a UTF-8 file, also of a gzipped one, or of one that starts with UTF-16's mark.

    `EvalError` where there is none or it cannot be read.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except FileNotFoundError:
        raise EvalError(f"{path}: no such file.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot be read as UTF-8 text: {error}.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
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
    """Objects of a JSON list, of JSON lines, or of the `{"imgToEval": {...}}` form; table rows.

    In the `imgToEval` form an object without `image_id` takes its key for one.
    """
    if (cure := tables.REFUSED.get(tables.kind(path))) is not None:
        raise EvalError(f"{path}: {tables.kind(path)} files are not read; {cure}.")
    if tables.is_table(path):
        return _table(path)
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


def _table(path: Path) -> list[Row]:
    sheet = tables.kind(path) == ".xlsx"
    lines = tables.sheet(path) if sheet else tables.separated(path, read_text(path))
    rows = [Row(where, cells) for where, cells in lines]
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
