"""docs/add-a-benchmark.md alone is enough: its class and its commands, as they stand."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from eval.__main__ import main
from eval.runs import jsonl
from tests.docs.test_programs import ROOT, blocks, commands

PAGE = ROOT / "docs" / "add-a-benchmark.md"
SMALL = ["batch_size=32", "splits=[test]", "device=cpu", "chair.images=30", "pope.images=1"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's file in it and the configs, where the commands are given."""
    (tmp_path / "my_benchmarks.py").write_text(blocks(PAGE, "python")[0])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_benchmarks", None)


def small(words: list[str]) -> list[str]:
    """The page's command on few images: fewer scenes are drawn, and fewer of them asked about."""
    if words[0] not in ("run", "sweep"):
        return words
    given = [*SMALL, "first_object.images=10"]
    return [*words, *(word for setting in given for word in ("--set", setting))]


def test_the_page_is_enough(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, str] = {}
    for words in commands(PAGE):
        assert main(small(words)) == 0, capsys.readouterr().err
        shown[words[0]] = capsys.readouterr().out
    rows = jsonl.read(Path("runs/first/gift/answers.jsonl"), ())
    assert {row["task"] for row in rows} == {"first_object"}
    assert len(rows) == 10
    metrics = json.loads(Path("runs/first/gift/metrics.json").read_text())
    score = metrics["first_object"]["test"]
    assert score["n"] == 10
    assert score["accuracy"] + score["silent"] <= 1.0
    low, high = score["intervals"]["accuracy"]
    assert low <= score["accuracy"] <= high
    assert score["accuracy"] == score["counts"]["right"] / 10
    for command in ("table", "compare"):
        assert "| test  | first_object, first object is there % |" in shown[command]
    assert re.search(r"\| \+\d+ -\d+, p = [\d.]+ +\|", shown["compare"]), "McNemar's test"
    assert "Chosen by first_object_accuracy, more is better: gift.alpha=" in shown["sweep"]
    plan = yaml.safe_load(Path("runs/first/sweep/sweep.yaml").read_text())
    assert plan["measure"] == "first_object_accuracy"


def test_a_run_is_scored_again_by_what_its_answers_say(checkout: Path) -> None:
    """Two answers written by hand: one names first what is there, one names nothing."""
    first = next(iter(commands(PAGE)))
    assert main([*small(first), "--limit", "2"]) == 0
    file = Path("runs/first/stock/answers.jsonl")
    rows = jsonl.read(file, ())
    rows[0] |= {"truth": ["cup"], "answer": "A cup and a dog."}
    rows[1] |= {"truth": ["cup"], "answer": "Nothing."}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", "runs/first/stock"]) == 0
    score = json.loads(Path("runs/first/stock/metrics.json").read_text())["first_object"]["test"]
    assert (score["accuracy"], score["silent"], score["n"]) == (0.5, 0.5, 2)


def test_a_wrong_import_path_is_explained(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "configs/pocket/baseline.yaml", "--out", "runs/x", "--set"]
    for task, said in (
        ("my_benchmark:FirstObject", "No module named 'my_benchmark'. Expected my_pkg.my_file:My"),
        ("my_benchmarks:Second", "has no attribute 'Second'. Expected my_pkg.my_file:MyBenchmark"),
        ("my_benchmarks:Sample", "expected a subclass of Benchmark, found <class"),
        ("my_benchmarks:Benchmark", "expected a name, and as settings a dataclass with max_new"),
    ):
        assert main([*run, f"tasks=[{task}]"]) == 1
        assert said in capsys.readouterr().err
    assert main([*run, "tasks=[my_benchmarks:FirstObject]", "--set", "first_object.image=3"]) == 1
    assert "unknown key in section first_object: image; did you mean images?" in (
        capsys.readouterr().err
    )
