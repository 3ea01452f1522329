"""Files that survive crashes and full disks."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.errors import EvalError
from eval.runs import jsonl


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_rows_come_back_in_order_and_may_hold_any_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    jsonl.append(file, [{"a": "a\nb"}, {"a": "Übergröße ☂"}])
    jsonl.append(file, [{"a": 3}])
    assert jsonl.read(file, ["a"]) == [{"a": "a\nb"}, {"a": "Übergröße ☂"}, {"a": 3}]
    assert len(file.read_bytes().splitlines()) == 3
    assert jsonl.read(tmp_path / "none.jsonl", ["a"]) == []


def test_a_full_disk_leaves_what_was_there_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    jsonl.append(file, [{"a": 1}])
    before = file.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(EvalError, match=r"rows\.jsonl cannot be written: No space left .*room"):
            jsonl.append(file, [{"a": 2}])
    assert file.read_bytes() == before
    jsonl.append(file, [{"a": 2}])
    assert jsonl.read(file, ["a"]) == [{"a": 1}, {"a": 2}]


def test_a_write_that_stops_in_the_middle_leaves_no_half_row(tmp_path: Path) -> None:
    """For real: a process whose files may only be 1000 bytes long."""
    file = tmp_path / "rows.jsonl"
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from eval.runs import jsonl as log\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for _ in range(9): log.append(Path(sys.argv[1]), [{'a': 'x' * 300}])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True)
    assert "rows.jsonl cannot be written: File too large" in ended.stderr
    assert jsonl.read(file, ["a"]) == [{"a": "x" * 300}] * 3
    assert file.stat().st_size == 3 * len('{"a": ""}\n' + "x" * 300)


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.json"
    jsonl.replace(file, "old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(EvalError, match=r"metrics\.json cannot be written: No space left"):
            jsonl.replace(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("metrics.json", "old")
    ]


def test_a_line_that_is_broken_off_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a"')
    assert jsonl.read(file, ["a"]) == [{"a": 1}]
    assert "the last line is incomplete" in capsys.readouterr().err
