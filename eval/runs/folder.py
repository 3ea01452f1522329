"""The folder of one run: config.yaml (what is run, on what), answers.jsonl, metrics.json.

Answers are appended and flushed batch by batch, so that a run resumes after any interruption. Where
several processes are at work, each writes files of its own (answers.rank-0.jsonl), which the next
`merge` brings into answers.jsonl.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from eval.errors import EvalError, notice
from eval.runs import jsonl
from eval.runs.batches import Outcome
from eval.runs.samples import Sample
from vlm_patch.models.chat import Response

KEY = ("task", "split", "id")
LOCK = ".lock"
# Settings that say how fast answers come, not which: they may change when a run resumes.
FREE = ("batch_size", "device", "device_map", "tp_plan")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    path: the folder
    """

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

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands out until the end of the block; a process that dies lets go.

        EvalError if another one is at work, or if the folder holds files that are no run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        strange = [entry.name for entry in self.path.iterdir() if not _ours(entry.name)]
        if strange and not self.config.exists():
            raise EvalError(
                f"{self.path} holds {min(strange)} but no config.yaml, so it is no run folder: "
                f"choose another --out"
            )
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise EvalError(
                f"another command is at work in {self.path}: wait for it to end, or choose "
                f"another --out"
            ) from None
        except (OSError, NotImplementedError) as error:
            notice(f"{self.path} cannot be locked ({error}): give one command at a time there")
        try:
            yield
        finally:
            lock.release()

    def open(self, record: Mapping[str, Any], files: Sequence[Path] = ()) -> dict[str, Any]:
        """Start the run that `record` describes or resume it; returns the record to keep.

        `files` are what scoring needs: the folder keeps copies.
        EvalError if the folder holds answers of another run.
        """
        if self.config.exists() and self._begun():
            kept = self.record()
            _check_same(self.path, kept, record)
            return kept
        for file in files:
            shutil.copyfile(file, self.path / file.name)
        self.write_record(record)
        return dict(record)

    def _begun(self) -> bool:
        """Whether there are answers."""
        logs = [file for path in (self.answers, self.skip_list) for file in self._parts(path)]
        return any(file.stat().st_size for file in logs)

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace config.yaml."""
        jsonl.replace(
            self.config, yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True)
        )

    def read_metrics(self) -> dict[str, Any]:
        """What metrics.json says."""
        metrics: dict[str, Any] = json.loads(self.metrics.read_text(encoding="utf-8"))
        return metrics

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Replace metrics.json; equal metrics give equal bytes."""
        jsonl.replace(self.metrics, json.dumps(metrics, indent=2, sort_keys=True) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The answers so far, of all processes, sorted by task, split and id."""
        return self._rows(self.answers, (*KEY, "answer"))

    def skipped(self) -> list[dict[str, Any]]:
        """The samples left out because their image is broken, each with its `reason`."""
        return self._rows(self.skip_list, (*KEY, "reason"))

    def _rows(self, path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
        rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for file in self._parts(path):
            rows = _unique(file, jsonl.read(file, fields)) | rows
        return [rows[key] for key in sorted(rows)]

    def _parts(self, path: Path) -> list[Path]:
        """The file and what single processes wrote beside it; it comes first."""
        files = [path, *sorted(self.path.glob(f"{path.stem}.rank-*{path.suffix}"))]
        return [file for file in files if file.exists()]

    def settled(self) -> set[tuple[str, ...]]:
        """Keys of the samples that need no request any more."""
        return {row_key(row) for row in (*self.rows(), *self.skipped())}

    def write(self, results: Sequence[Outcome], rank: int | None = None) -> None:
        """Add what came of some samples; `rank`: to the files of this one of several processes."""
        answers = [_line(sample, it) for sample, it in results if isinstance(it, Response)]
        skipped = [
            _skip(sample, it.reason) for sample, it in results if not isinstance(it, Response)
        ]
        for path, rows in ((self.answers, answers), (self.skip_list, skipped)):
            if rows:
                own = path if rank is None else path.with_suffix(f".rank-{rank}{path.suffix}")
                jsonl.append(own, rows)

    def merge(self, samples: Sequence[Sample]) -> None:
        """Bring all answers into answers.jsonl in the order of the samples, torn lines left out."""
        order: dict[tuple[str, ...], int]
        order = {sample.key: number for number, sample in enumerate(samples)}
        for path, rows in ((self.answers, self.rows()), (self.skip_list, self.skipped())):
            rows.sort(key=lambda row: order.get(row_key(row), len(order)))
            text, parts = jsonl.lines(rows), self._parts(path)
            if parts and (parts[0] != path or path.read_bytes() != text.encode()):
                jsonl.replace(path, text)
            for part in parts:
                if part != path:
                    part.unlink()

    def remember(self, provenance: Mapping[str, Sequence[Any]]) -> None:
        """Add what is new of environments, patches and notes to config.yaml."""
        record = self.record()
        new = {key: [it for it in provenance[key] if it not in record[key]] for key in provenance}
        if any(new.values()):
            self.write_record({**record, **{key: record[key] + new[key] for key in new}})


def _line(sample: Sample, answer: Response) -> dict[str, Any]:
    """One line of answers.jsonl."""
    shown = {"image": sample.image.name, "prompt": sample.prompt}
    response = {"answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
    return {**_key(sample), **shown, **response, **sample.facts}


def _skip(sample: Sample, reason: str) -> dict[str, Any]:
    """One line of skipped.jsonl."""
    return {**_key(sample), "image": sample.image.name, "reason": reason}


def _key(sample: Sample) -> dict[str, str]:
    return dict(zip(KEY, sample.key, strict=True))


def _ours(name: str) -> bool:
    """Files that are there before config.yaml is."""
    return name in ("scenes", LOCK) or name.startswith("config.yaml.")


def row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Which sample an answer is of: (task, split, id)."""
    return tuple(str(row[key]) for key in KEY)


def _unique(path: Path, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Rows by sample; EvalError if one file holds a sample twice."""
    unique: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        if (key := row_key(row)) in unique:
            raise EvalError(
                f"{path}, line {number} answers {' '.join(key)} a second time: delete one line"
            )
        unique[key] = row
    return unique


def _check_same(path: Path, kept: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """EvalError if the run in `path` has other settings or other data than the one requested."""
    old, new = _flat(kept["settings"]), _flat(requested["settings"])
    differing = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in FREE
    ]
    if not differing and kept["data"] != requested["data"]:
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
