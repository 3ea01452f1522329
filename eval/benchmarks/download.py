"""Fetch a benchmark's files from where its authors put them; `sources.yaml` says where that is.

An interrupted download is resumed. Every file is checked: against a known SHA-256, or against the
one that its first download brought, which `sources.lock.json` beside the files keeps. Files of the
Hugging Face hub are fetched by its own client, which knows mirrors (HF_ENDPOINT) and tokens.
"""

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
from huggingface_hub import hf_hub_download
from tqdm import tqdm

from eval.benchmarks.rows import read_json
from eval.errors import EvalError

SOURCES = Path(__file__).parent / "sources.yaml"
LOCK = "sources.lock.json"
_CHUNK = 1 << 16


@dataclass(frozen=True)
class File:
    """One file of a benchmark.

    path: where it goes, inside the folder
    url: where it comes from
    sha256: its checksum, where that is known
    hub: the dataset repository on the hub that holds it, under the same path
    """

    path: str
    url: str
    sha256: str | None = None
    hub: str | None = None


@dataclass(frozen=True)
class Source:
    """The files of one benchmark.

    about: what they are
    files: what is fetched
    by_hand: what is left to be done by hand
    """

    about: str
    files: tuple[File, ...]
    by_hand: str = ""


def sources(path: Path = SOURCES) -> dict[str, Source]:
    """Every benchmark that has files to fetch, or a note on how to get them."""
    table: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        name: Source(
            entry["about"],
            tuple(file for listed in entry["files"] for file in _files(listed)),
            entry.get("by_hand", ""),
        )
        for name, entry in table.items()
    }


def _files(entry: Mapping[str, Any]) -> Iterator[File]:
    first, last = entry.get("numbers", (0, 0))
    hub = entry.get("hub")
    for n in range(first, last + 1):
        path = entry["path"].format(n=n)
        url = entry["url"].format(n=n) if hub is None else f"hf://datasets/{hub}/{path}"
        yield File(path, url, entry.get("sha256"), hub)


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
        return f"{path}: already there{'' if expected else ', unchecked: no checksum is known'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.hub is None:
        download(file.url, part := path.with_name(path.name + ".part"))
    else:
        part = _download_from_hub(file, file.hub, folder)
    checksum = sha256(part)
    if expected is not None and checksum != expected:
        part.unlink()
        raise EvalError(
            f"{file.url}: SHA-256 {checksum}, expected {what} one, {expected}. The partial file is "
            "deleted: run again; if it stays so, the file was changed at its source."
        )
    part.replace(path)
    lock[file.path] = {"url": file.url, "sha256": checksum, "bytes": path.stat().st_size}
    (folder / LOCK).write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n")
    checked = "checked" if expected else f"its SHA-256 is new and goes into {LOCK}"
    return f"{path}: fetched, {checked}"


def _download_from_hub(file: File, hub: str, folder: Path) -> Path:
    """The path of the file, fetched into the folder by the hub's client."""
    try:
        return Path(hf_hub_download(hub, file.path, repo_type="dataset", local_dir=folder))
    except Exception as error:  # of whichever HTTP library the hub's client uses
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise EvalError(
            f"{file.url}: not fetched into {folder} ({reason}). The same command resumes. If the "
            "file has moved in its repository, put it into the folder by hand."
        ) from error


def download(url: str, part: Path) -> None:
    """Write the content of `url` to `part`, after what is already there."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            _save(response, part, have if response.status == 206 else 0)
    except urllib.error.HTTPError as error:
        _explain(error, url, part, have)
    except (OSError, HTTPException) as error:
        raise EvalError(
            f"{url}: not fetched into {part} ({error}). What has come is kept: the same command "
            "resumes."
        ) from error


def _save(response: Any, part: Path, have: int) -> None:
    length = response.headers["Content-Length"]
    total = None if length is None else have + int(length)
    bar = tqdm(
        desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024
    )
    with bar, part.open("ab" if have else "wb") as file:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise EvalError(
            f"{response.url}: interrupted at {part.stat().st_size} of {total} bytes. They are "
            "kept: the same command resumes from there."
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
