"""docs/add-a-method.md alone is enough: its class, its test and its commands, as they stand."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from eval.__main__ import main
from eval.runs import jsonl
from tests.docs.test_programs import ROOT, blocks, commands

PAGE = ROOT / "docs" / "add-a-method.md"
SMALL = [
    "splits=[test]",
    "device=cpu",
    "tasks=[chair]",
    "chair.images=8",
    "chair.max_new_tokens=64",
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's files in it and the configs, where the commands are given."""
    (tmp_path / "my_methods.py").write_text(blocks(PAGE, "python")[0])
    (tmp_path / "test_my_methods.py").write_text(blocks(PAGE, "py")[0])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_methods", None)


def small(words: list[str]) -> list[str]:
    """The page's command on few images, and in few rounds."""
    if words[0] == "speed":
        return [*words, "--repeats", "1", "--device", "cpu"]
    if words[0] not in ("run", "sweep"):
        return words
    return [*words, *(word for setting in SMALL for word in ("--set", setting))]


def test_the_page_is_enough(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(PAGE):
        assert main(small(words)) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    rows = json.loads(Path("runs/boost/speed/speed.json").read_text())["rows"]
    ours = [row for row in rows if row["kind"] == "ours"]
    assert {row["method"] for row in ours} == {"my_methods:Boost"}
    assert all(row["change"] > 0 for row in ours)
    settings = yaml.safe_load(Path("runs/boost/boost/config.yaml").read_text())["settings"]
    assert settings["methods"] == ["my_methods:Boost"]
    assert settings["boost"] == {"factor": 2.0}
    answers = [
        [row["answer"] for row in jsonl.read(Path(f"runs/boost/{name}/answers.jsonl"), ())]
        for name in ("stock", "boost")
    ]
    assert len(answers[0]) == 8
    assert answers[0] != answers[1]
    chosen = yaml.safe_load(Path("runs/boost/sweep/sweep.yaml").read_text())["chosen"]
    assert chosen in {f"boost.factor={factor}" for factor in ("1.2", "1.5", "2")}
    assert "chair" in shown.lower()


def test_the_page_s_test_passes(checkout: Path) -> None:
    path = os.pathsep.join([str(checkout), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_methods.py"]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
