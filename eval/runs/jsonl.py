"""Files that outlive crashes and full disks: JSON lines that grow, texts replaced as a whole."""

import json
import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.runs.samples import notice


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text, one JSON object a line."""
    return "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows, one JSON object a line, and see them on the disk.

    EvalError if they cannot be written (a full disk); the file is then as it was before.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines(rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, before)
        raise _unwritten(path, error) from error


def replace(path: Path, text: str) -> None:
    """Replace a file in one step: a crash leaves the old one or the new one, never half."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise _unwritten(path, error) from error


def read(path: Path, fields: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a file, all of which hold `fields`; none if there is no file.

    A last line that a crash left broken is passed over with a notice. EvalError names any other
    broken line.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    *whole, torn = text.split(b"\n")
    parsed = [_row(line, fields) for line in whole]
    if not torn and parsed[-1:] == [None]:
        torn = whole[-1]
        parsed.pop()
    if torn:
        notice(f"{path}: the last line is incomplete; its sample is not answered yet")
    rows = [row for row in parsed if row is not None]
    if len(rows) < len(parsed):
        raise EvalError(
            f"{path}, line {parsed.index(None) + 1} is no answer (expected a JSON object with "
            f"{', '.join(fields)}): delete the line and run again, its sample is then done anew"
        )
    return rows


def _row(line: bytes, fields: Collection[str]) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {*fields} <= row.keys() else None


def _unwritten(path: Path, error: OSError) -> EvalError:
    return EvalError(
        f"{path} cannot be written: {error.strerror or error}. What was written before is kept: "
        f"make room and give the same command again, which resumes from there"
    )
