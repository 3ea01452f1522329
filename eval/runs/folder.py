"""The folder of one run: config.yaml (what is run, on what), answers.jsonl, metrics.json.

Answers are appended and flushed batch by batch, so that a run goes on after any interruption.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.runs import jsonl
from eval.errors import EvalError

KEY = ("task", "split", "id")
# Settings that say how fast answers come, not which: they may change when a run goes on.
FREE = ("batch_size", "device", "device_map", "tp_plan")


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
    def skip_list(self) -> Path:
        return self.path / "skipped.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def work(self) -> Path:
        """What several processes leave here while they are at work; gone when all is done."""
        return self.path / "work"

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

    def open(self, record: Mapping[str, Any], files: Sequence[Path] = ()) -> dict[str, Any]:
        """Start the run that `record` describes or go on with it; returns the record to keep.

        `files` are what scoring needs: the folder keeps copies.

        EvalError if the folder holds answers of another run, or files that are no run.
        """
        if self.config.exists() and self._begun():
            found = self.record()
            _check_same(self.path, found, record)
            return found
        self.path.mkdir(parents=True, exist_ok=True)
        strange = [entry.name for entry in self.path.iterdir() if not _ours(entry.name)]
        if strange and not self.config.exists():
            raise EvalError(
                f"{self.path} holds {min(strange)} but no config.yaml, so it is no run folder: "
                f"choose another --out"
            )
        for file in files:
            shutil.copyfile(file, self.path / file.name)
        self.write_record(record)
        return dict(record)

    def _begun(self) -> bool:
        """Whether there are answers, or a process that is about to make some."""
        logs = [*self.parts(self.answers), *self.parts(self.skip_list)]
        logs += [file for file in (self.answers, self.skip_list) if file.exists()]
        return any(file.stat().st_size for file in logs) or any(self.work.glob("*.alive"))

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace config.yaml."""
        jsonl.replace(self.config, yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True))

    def finished(self) -> dict[str, Any] | None:
        """What metrics.json says, if it tells of all samples of the run."""
        try:
            metrics: dict[str, Any] = json.loads(self.metrics.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        complete = metrics["answered"] + metrics.get("skipped", 0) == metrics["samples"]
        return metrics if complete else None

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Replace metrics.json; equal metrics give equal bytes."""
        jsonl.replace(self.metrics, json.dumps(metrics, indent=2, sort_keys=True) + "\n")

    def rows(self, repair: bool = False, quiet: bool = False) -> list[dict[str, Any]]:
        """The answers so far, sorted by task, split and id; for the switches see `log.read`."""
        return self._merged(self.answers, (*KEY, "answer"), repair, quiet)

    def skipped(self, repair: bool = False, quiet: bool = False) -> list[dict[str, Any]]:
        """The samples left out because their image is broken, each with its `reason`."""
        return self._merged(self.skip_list, (*KEY, "reason"), repair, quiet)

    def _merged(
        self, path: Path, fields: Sequence[str], repair: bool, quiet: bool
    ) -> list[dict[str, Any]]:
        """Rows of a file and of its parts by single processes, each sample once.

        Parts are read first: they only vanish when the file holds what was in them.
        """
        parts = [_unique(part, jsonl.read(part, fields, quiet=True)) for part in self.parts(path)]
        rows = _unique(path, jsonl.read(path, fields, repair, quiet))
        for part in parts:
            rows = part | rows
        return [rows[key] for key in sorted(rows)]

    def parts(self, path: Path) -> list[Path]:
        """What processes beside the one that writes `path` wrote of it."""
        return sorted(self.work.glob(f"*.{path.name}"))

    def part(self, path: Path, name: str) -> Path:
        """Where the process `name` writes its part of `path`."""
        return self.work / f"{name}.{path.name}"

    def settled(self, repair: bool = False) -> set[tuple[str, ...]]:
        """Keys of the samples that need not be asked any more, also while others write."""
        found = [*self.rows(repair, not repair), *self.skipped(repair, not repair)]
        return {row_key(row) for row in found}

    def report(self, name: str, made: Mapping[str, Sequence[Any]]) -> None:
        """Leave what process `name` found of its environments, patches and notes for `gather`."""
        jsonl.append(self.work / f"{name}.report", [made])

    def gather(self) -> None:
        """Bring what lies in parts and reports into the files of the run, and drop those."""
        for path, rows in ((self.answers, self.rows()), (self.skip_list, self.skipped())):
            there = _unique(path, jsonl.read(path, KEY, repair=True))
            if missing := [row for row in rows if row_key(row) not in there]:
                jsonl.append(path, missing)
            for part in self.parts(path):
                part.unlink(missing_ok=True)
        self.gather_reports()

    def gather_reports(self) -> None:
        """What the processes found of themselves goes into config.yaml, each thing once."""
        record, reports = self.record(), sorted(self.work.glob("*.report"))
        for made in [made for report in reports for made in jsonl.read(report, ())]:
            for key, found in made.items():
                record[key] += [item for item in found if item not in record[key]]
        if reports:
            self.write_record(record)
        for report in reports:
            report.unlink(missing_ok=True)


def _ours(name: str) -> bool:
    """Files that are there before config.yaml is."""
    return name in ("scenes", "work") or name.startswith("config.yaml.")


def row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Which sample an answer is of: (task, split, id)."""
    return tuple(str(row[key]) for key in KEY)


def _unique(path: Path, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows by sample; EvalError if one file holds a sample twice."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        if (key := row_key(row)) in found:
            raise EvalError(
                f"{path}, line {number} answers {' '.join(key)} a second time: delete one line"
            )
        found[key] = row
    return found


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
