"""The folder of one run: config.yaml (what is run, on what), answers.jsonl, metrics.json.

Answers are appended and flushed batch by batch, so that a run goes on after any interruption.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.dataset import notice
from eval.errors import EvalError

KEY = ("task", "split", "id")
# Settings that say how fast answers come, not which: they may change when a run goes on.
FREE = ("batch_size", "device", "device_map")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def answers(self) -> Path:
        return self.path / "answers.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    def record(self) -> dict[str, Any]:
        """What config.yaml says; EvalError if this is no run folder."""
        try:
            record = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EvalError(
                f"{self.path} is not a run folder (it has no config.yaml); make one with: "
                f"python -m eval run CONFIG --out {self.path}"
            ) from None
        except yaml.YAMLError as error:
            raise EvalError(f"{self.config} is not YAML: {error}") from error
        missing = {"settings", "data", "environments", "patches", "notes"}
        missing -= set(record if isinstance(record, dict) else ())
        if missing:
            raise EvalError(f"{self.config} is not the record of a run: no {min(missing)} in it")
        return dict(record)

    def open(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Start the run that `record` describes or go on with it; returns the record to keep.

        EvalError if the folder holds answers of another run, or files that are no run.
        """
        if self.config.exists() and self.answers.exists():
            found = self.record()
            _check_same(self.path, found, record)
            return found
        self.path.mkdir(parents=True, exist_ok=True)
        strange = [entry.name for entry in self.path.iterdir() if entry.name != "scenes"]
        if strange and not self.config.exists():
            raise EvalError(
                f"{self.path} holds {min(strange)} but no config.yaml, so it is no run folder: "
                f"choose another --out"
            )
        synonyms = record["settings"]["chair"]["synonyms"]
        if synonyms is not None:
            shutil.copyfile(synonyms, self.path / Path(synonyms).name)
        self.write_record(record)
        return dict(record)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace config.yaml."""
        _write(self.config, yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True))

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Replace metrics.json; equal metrics give equal bytes."""
        _write(self.metrics, json.dumps(metrics, indent=2, sort_keys=True) + "\n")

    def rows(self, repair: bool = False) -> list[dict[str, Any]]:
        """The answers so far, sorted by task, split and id.

        A last line that a crash left broken is passed over with a notice; `repair` also cuts it off
        the file, so that the next answer starts a line of its own.
        """
        text = self.answers.read_bytes() if self.answers.exists() else b""
        *lines, torn = text.split(b"\n")
        found = [_row(line) for line in lines]
        if not torn and found and found[-1] is None:
            found.pop()
            torn = lines.pop() + b"\n"
        if torn:
            notice(f"{self.answers}: the last line is broken off; its sample is not answered yet")
            if repair:
                os.truncate(self.answers, len(text) - len(torn))
        return self._checked(found)

    def _checked(self, found: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
        rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for number, row in enumerate(found, 1):
            where = f"{self.answers}, line {number}"
            if row is None:
                raise EvalError(
                    f"{where} is no answer (expected a JSON object with {', '.join(KEY)}, answer): "
                    f"delete the line and run again, its sample is then done anew"
                )
            key = row_key(row)
            if key in rows:
                raise EvalError(f"{where} answers {' '.join(key)} a second time: delete one line")
            rows[key] = row
        return [rows[key] for key in sorted(rows)]

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add answers, one JSON object a line, and hand them to the operating system."""
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        with self.answers.open("a", encoding="utf-8") as file:
            file.write(text)


def row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Which sample an answer is of: (task, split, id)."""
    return tuple(str(row[key]) for key in KEY)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {*KEY, "answer"} <= row.keys() else None


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """EvalError if the run in `path` has other settings or other data than the one asked for."""
    old, new = _flat(found["settings"]), _flat(wanted["settings"])
    differing = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in FREE
    ]
    if not differing and found["data"] != wanted["data"]:
        differing = ["images, prompts or annotations changed though the settings are the same"]
    if differing:
        raise EvalError(
            f"{path} holds another run: {'; '.join(differing)}. "
            f"Choose another --out, put the settings back, or delete {path} to start anew"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        flat |= inner or {f"{prefix}{key}": value}
    return flat


def _write(path: Path, text: str) -> None:
    """Replace a file in one step: a crash leaves the old one or the new one, never half."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
