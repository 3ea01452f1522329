"""Fetch a benchmark's files from where its authors put them; `sources.yaml` says where that is.

A download that breaks off goes on from there. Every file is checked: against a known SHA-256, or
against the one that its first download brought, which `sources.lock.json` beside the files keeps.
"""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from eval.benchmarks.rows import read_json
from eval.errors import EvalError

SOURCES = Path(__file__).parent / "sources.yaml"
LOCK = "sources.lock.json"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class File:
    """One file: where it goes, where it comes from, and its SHA-256 where that is known."""

    path: str
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """The files of one benchmark, and what is left to be done by hand."""

    about: str
    files: tuple[File, ...]
    by_hand: str = ""


def sources(path: Path = SOURCES) -> dict[str, Source]:
    """Every benchmark that has files to fetch, or a word on how to get them."""
    table: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        name: Source(
            entry["about"],
            tuple(file for listed in entry["files"] for file in _files(listed)),
            entry.get("by_hand", ""),
        )
        for name, entry in table.items()
    }


def _files(listed: Mapping[str, Any]) -> Iterator[File]:
    if "numbers" not in listed:
        yield File(listed["path"], listed["url"], listed.get("sha256"))
        return
    first, last = listed["numbers"]
    for n in range(first, last + 1):
        yield File(listed["path"].format(n=n), listed["url"].format(n=n))


def fetch(source: Source, folder: Path) -> list[str]:
    """Fetch what the folder lacks; returns a line a file. `EvalError` if one cannot be had."""
    if not source.files:
        raise EvalError(source.by_hand)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _read_lock(folder / LOCK)
    return [_fetch(file, folder, lock) for file in source.files]


def _fetch(file: File, folder: Path, lock: dict[str, dict[str, Any]]) -> str:
    path = folder / file.path
    seen = lock.get(file.path, {}).get("sha256")
    expected, what = (file.sha256, "the published") if file.sha256 else (seen, "the recorded")
    if path.is_file():
        if expected is not None and sha256(path) != expected:
            raise EvalError(f"{path}: is not {what} file ({expected}). Delete it to fetch it anew.")
        return f"{path}: there already{'' if expected else ', unchecked: no checksum is known'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    download(file.url, part)
    found = sha256(part)
    if expected is not None and found != expected:
        part.unlink()
        raise EvalError(
            f"{file.url}: SHA-256 {found}, expected {what} one, {expected}. The partial file is "
            "deleted: run again; if it stays so, the file was changed at its source."
        )
    part.replace(path)
    lock[file.path] = {"url": file.url, "sha256": found, "bytes": path.stat().st_size}
    (folder / LOCK).write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n")
    checked = "checked" if expected else f"its SHA-256 is new and goes into {LOCK}"
    return f"{path}: fetched, {checked}"


def download(url: str, part: Path) -> None:
    """The content of `url` into `part`, going on at its end if it is there."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            _save(answer, part, have if answer.status == 206 else 0)
    except urllib.error.HTTPError as error:
        _explain(error, url, part, have)
    except (OSError, HTTPException) as error:
        raise EvalError(
            f"{url}: not fetched into {part} ({error}). What has come is kept: the same command "
            "goes on."
        ) from error


def _save(answer: Any, part: Path, have: int) -> None:
    length = answer.headers["Content-Length"]
    total = None if length is None else have + int(length)
    bar = tqdm(
        desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024
    )
    with bar, part.open("ab" if have else "wb") as file:
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise EvalError(
            f"{answer.url}: broke off at {part.stat().st_size} of {total} bytes. They are kept: "
            "the same command goes on from there."
        )


def _explain(error: urllib.error.HTTPError, url: str, part: Path, have: int) -> None:
    """Nothing to do if the range was refused since all is there; else `EvalError`."""
    if error.code == 416:
        if error.headers["Content-Range"] == f"bytes */{have}":
            return
        part.unlink()
        raise EvalError(f"{url}: does not fit the {have} bytes here; they are deleted: run again.")
    raise EvalError(
        f"{url}: HTTP {error.code} {error.reason}. Look in the benchmark's repository whether the "
        "file has moved, and put it into the folder by hand if so."
    ) from error


def _read_lock(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    lock = read_json(path)
    if not isinstance(lock, dict) or not all(isinstance(entry, dict) for entry in lock.values()):
        raise EvalError(f"{path}: expected {{file: {{url, sha256, bytes}}}}. Delete it.")
    return lock


def sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
