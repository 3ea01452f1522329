"""Fetching data: from a server on the loopback address that behaves, and one that does not."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from eval.__main__ import main
from eval.benchmarks import download
from eval.benchmarks.download import LOCK, File, Source, fetch, sources
from eval.errors import EvalError
from tests.support.local_server import reply, serving
from tests.support.shared_data import SHARED, shared

CONTENT = bytes(range(256)) * 1000
SUM = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Host:
    """Serves CONTENT; breaks off once after `stops_at` bytes; knows `ranges`."""

    url: str = ""
    stops_at: int | None = None
    ranges: bool = True
    content: bytes = CONTENT
    lacks: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers["Range"]
        self.asked.append((handler.path, wanted))
        if handler.path == "/gone" or self.lacks:
            return reply(handler, 404, b"", X_Error_Code="EntryNotFound")
        if handler.command == "HEAD":
            etag = hashlib.sha1(self.content).hexdigest()
            facts = {"X_Repo_Commit": "0" * 40, "ETag": f'"{etag}"'}
            return reply(handler, 200, self.content, **facts)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        size = len(self.content)
        if start >= size:
            return reply(handler, 416, b"", Content_Range=f"bytes */{size}")
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(size - start))
        handler.end_headers()
        handler.wfile.write(self.content[start : self.stops_at])
        self.stops_at = None


@pytest.fixture
def host() -> Iterator[Host]:
    known = Host()
    with serving(known.respond) as url:
        known.url = url
        yield known


def source(host: Host, sha256: str | None = SUM, place: str = "file") -> Source:
    return Source("a file", (File("sub/file.bin", f"{host.url}/{place}", sha256),))


def lock(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / LOCK).read_text())  # type: ignore[no-any-return]


def test_a_file_is_fetched_checked_and_then_left_alone(host: Host, tmp_path: Path) -> None:
    (said,) = fetch(source(host), tmp_path)
    assert said.endswith("file.bin: fetched, checked")
    assert (tmp_path / "sub" / "file.bin").read_bytes() == CONTENT
    entry = {"url": f"{host.url}/file", "sha256": SUM, "bytes": len(CONTENT)}
    assert lock(tmp_path) == {"sub/file.bin": entry}
    assert fetch(source(host), tmp_path) == [f"{tmp_path}/sub/file.bin: already there"]
    assert host.asked == [("/file", None)]
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["file.bin"]


def test_a_download_that_breaks_off_goes_on(host: Host, tmp_path: Path) -> None:
    host.stops_at = 100_000
    with pytest.raises(EvalError, match=r"/file: interrupted at 100000 of 256000 bytes.*resumes"):
        fetch(source(host), tmp_path)
    assert (tmp_path / "sub" / "file.bin.part").stat().st_size == 100_000
    fetch(source(host), tmp_path)
    assert (tmp_path / "sub" / "file.bin").read_bytes() == CONTENT
    assert host.asked == [("/file", None), ("/file", "bytes=100000-")]


def test_pieces_without_a_length_that_break_off(host: Host, tmp_path: Path) -> None:
    """Chunked transfer: the end is announced, so its absence is noticed."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"10\r\n" + CONTENT[:16] + b"\r\n10\r\n" + CONTENT[16:20])
        handler.close_connection = True

    with serving(respond) as url:
        broken = Source("a file", (File("file.bin", f"{url}/file", SUM),))
        with pytest.raises(EvalError, match=r"not fetched into .*file\.bin\.part .*resumes"):
            fetch(broken, tmp_path)
    assert not (tmp_path / "file.bin").exists()


def test_a_full_disk(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(download, "_save", full)
        with pytest.raises(EvalError, match=r"file\.bin\.part .*No space left.* resumes"):
            fetch(source(host), tmp_path)
    assert fetch(source(host), tmp_path)[0].endswith("fetched, checked")


def test_a_server_without_ranges_starts_over(host: Host, tmp_path: Path) -> None:
    host.stops_at, host.ranges = 100_000, False
    with pytest.raises(EvalError, match="interrupted at"):
        fetch(source(host), tmp_path)
    fetch(source(host), tmp_path)
    assert (tmp_path / "sub" / "file.bin").read_bytes() == CONTENT


def test_a_part_that_is_whole_already_is_taken(host: Host, tmp_path: Path) -> None:
    part = tmp_path / "sub" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    fetch(source(host), tmp_path)
    assert (tmp_path / "sub" / "file.bin").read_bytes() == CONTENT
    assert host.asked == [("/file", f"bytes={len(CONTENT)}-")]


def test_a_part_that_is_too_long_is_given_up(host: Host, tmp_path: Path) -> None:
    part = tmp_path / "sub" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT + b"more")
    with pytest.raises(EvalError, match="does not fit the 256004 bytes here"):
        fetch(source(host), tmp_path)
    fetch(source(host), tmp_path)
    assert (tmp_path / "sub" / "file.bin").read_bytes() == CONTENT


def test_a_wrong_checksum(host: Host, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=rf"SHA-256 {SUM}, expected the published one, 0+\."):
        fetch(source(host, "0" * 64), tmp_path)
    assert list((tmp_path / "sub").iterdir()) == []
    assert not (tmp_path / LOCK).exists()


def test_a_file_that_was_changed_here(host: Host, tmp_path: Path) -> None:
    fetch(source(host), tmp_path)
    (tmp_path / "sub" / "file.bin").write_bytes(b"changed")
    with pytest.raises(EvalError, match=r"file\.bin: is not the published file .*Delete it"):
        fetch(source(host), tmp_path)


def test_without_a_known_checksum_the_first_download_sets_it(host: Host, tmp_path: Path) -> None:
    (said,) = fetch(source(host, None), tmp_path)
    assert said.endswith(f"fetched, its SHA-256 is new and goes into {LOCK}")
    assert lock(tmp_path)["sub/file.bin"]["sha256"] == SUM
    (tmp_path / "sub" / "file.bin").unlink()
    host.content = CONTENT[:-1]
    with pytest.raises(EvalError, match=rf"expected the recorded one, {SUM}"):
        fetch(source(host, None), tmp_path)
    host.content = CONTENT
    (said,) = fetch(source(host, None), tmp_path)
    assert said.endswith("fetched, checked")


def test_a_file_that_is_gone(host: Host, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"/gone: HTTP 404 .*whether the file has moved"):
        fetch(source(host, place="gone"), tmp_path)


def test_nobody_there(host: Host, tmp_path: Path) -> None:
    nowhere = Source("a file", (File("file.bin", "http://127.0.0.1:9/file"),))
    with pytest.raises(EvalError, match=r"not fetched into .*Connection refused.*the same command"):
        fetch(nowhere, tmp_path)


def test_a_broken_lock_is_named(host: Host, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("[1]")
    with pytest.raises(EvalError, match=r"sources\.lock\.json: expected"):
        fetch(source(host), tmp_path)


def test_the_command(
    host: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = tmp_path / "sources.yaml"
    table.write_text(
        f"toy:\n  about: two files\n  by_hand: Ask for the images.\n  files:\n"
        f"    - {{path: 'images/{{n:02d}}.bin', url: '{host.url}/{{n}}', numbers: [1, 2]}}\n"
        "asked:\n  about: nothing\n  by_hand: Ask the authors.\n  files: []\n"
    )
    known = sources(table)
    monkeypatch.setattr(download, "sources", lambda: known)
    to = ["--to", str(tmp_path / "to")]
    assert main(["data", "toy", *to]) == 0
    shown = capsys.readouterr().out
    assert "01.bin: fetched" in shown
    assert shown.endswith("by hand: Ask for the images.\n")
    assert [place for place, _ in host.asked] == ["/1", "/2"]
    assert main(["data", "asked", *to]) == 1
    assert capsys.readouterr().err == "error: Ask the authors.\n"
    assert main(["data", "other", *to]) == 1
    assert capsys.readouterr().err == "error: data other: expected one of toy, asked.\n"


def test_the_sources() -> None:
    listed = sources()
    names = "chair coco pope amber mme hallusionbench mmvp object-halbench mmhal llava-bench"
    assert list(listed) == names.split()
    files = [file for one in listed.values() for file in one.files]
    assert len({file.url for file in files}) == len(files)
    for file in files:
        assert file.url.startswith(("https://", "http://images.cocodataset.org/", "hf://"))
        if "githubusercontent" in file.url:
            assert re.search(r"/[0-9a-f]{40}/", file.url)
    assert len(listed["mmvp"].files) == 301
    assert listed["llava-bench"].files[3].path == "images/001.jpg"
    assert all(one.files or one.by_hand for one in listed.values())


@shared
def test_known_checksums_are_those_of_the_shared_files() -> None:
    folders = {"object-halbench": "obj_halbench"}
    checked = 0
    for name, one in sources().items():
        for file in (file for file in one.files if file.sha256):
            path = SHARED / folders.get(name, name) / file.path
            assert download.sha256(path) == file.sha256, file.path
            checked += 1
    assert checked == 9


@pytest.fixture
def hub(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The host as a stand-in of the hub, where its client looks for it."""
    template = f"{host.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):  # huggingface_hub before 1 reads the latter's
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", host.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return host


def test_a_file_of_the_hub_is_fetched_by_its_client_and_checked(hub: Host, tmp_path: Path) -> None:
    files = (File("sub/a file.bin", "hf://datasets/some/set/sub/a file.bin", None, "some/set"),)
    (said,) = fetch(Source("a file", files), tmp_path)
    assert said.endswith(f"fetched, its SHA-256 is new and goes into {LOCK}")
    assert (tmp_path / "sub" / "a file.bin").read_bytes() == CONTENT
    paths = [path for path, _ in hub.asked if not path.startswith("/api/")]
    assert set(paths) == {"/datasets/some/set/resolve/main/sub/a%20file.bin"}
    entry = {"url": files[0].url, "sha256": SUM, "bytes": len(CONTENT)}
    assert lock(tmp_path) == {"sub/a file.bin": entry}
    requests = len(hub.asked)
    assert fetch(Source("a file", files), tmp_path)[0].endswith("a file.bin: already there")
    assert len(hub.asked) == requests
    (tmp_path / "sub" / "a file.bin").unlink()
    hub.content = CONTENT[:-1]
    with pytest.raises(EvalError, match=rf"expected the recorded one, {SUM}"):
        fetch(Source("a file", files), tmp_path)
    assert not (tmp_path / "sub" / "a file.bin").exists()


def test_a_file_that_the_hub_lacks(hub: Host, tmp_path: Path) -> None:
    hub.lacks = True
    lost = Source(
        "a file", (File("gone.bin", "hf://datasets/some/set/gone.bin", None, "some/set"),)
    )
    with pytest.raises(EvalError, match=r"hf://datasets/some/set/gone\.bin: not fetched .*by hand"):
        fetch(lost, tmp_path)
