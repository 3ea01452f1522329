"""The table as CSV and LaTeX, and the picture."""

import builtins
import csv
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval.__main__ import main
from eval.benchmarks.registry import TASKS
from eval.errors import EvalError
from eval.reports import export, plot, table
from tests.eval.reports.test_table import chair, folder, pope


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    stock = {"chair": {"test": chair(chair_s=0.385)}, "pope": {"test": {"random": pope()}}}
    gift = {"chair": {"test": chair(chair_s=0.01, no_object_share=0.84)}}
    return [folder(tmp_path / "stock_1", stock), folder(tmp_path / "gift", gift)]


def test_csv_holds_every_number_as_metrics_json_does(runs: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(export.write(runs, "csv"))))
    assert len(rows) == 2 * len(TASKS["chair"].measures) + len(TASKS["pope"].measures)
    first = rows[0]
    assert first == {
        **{"run": "stock_1", "split": "test", "measure": "chair_s"},
        **{"value": "0.385", "low": str(0.385 - 0.1), "high": str(0.385 + 0.123), "n": "200"},
    }
    questions = [row for row in rows if row["measure"] == "pope_random_accuracy"]
    assert [(row["run"], row["value"], row["n"]) for row in questions] == [
        ("stock_1", "0.75", "360")
    ]


def test_latex_is_a_whole_tabular_with_everything_escaped(runs: list[Path]) -> None:
    text = export.write(runs, "latex")
    lines = text.splitlines()
    comments = [line for line in lines if line.startswith("%")]
    assert any("degeneration alarm, silence: 84.0 % of the captions" in line for line in comments)
    body = lines[len(comments) :]
    assert body[:4] == [
        r"\begin{tabular}{llrr}",
        r"\toprule",
        r"split & measure & stock\_1 & gift \\",
        r"\midrule",
    ]
    assert body[4] == r"test & degeneration alarm & no & SILENCE \\"
    assert body[5] == r"test & CHAIR\_S \% & 38.5 [28.5, 50.8] & 1.0 [-9.0, 13.3] \\"
    assert body[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert {line.count(" & ") for line in body[4:-2]} == {3}
    assert export._escaped(r"a\b~50%^{x}") == (
        r"a\textbackslash{}b\textasciitilde{}50\%\textasciicircum{}\{x\}"
    )


def test_an_unknown_format_is_refused(runs: list[Path]) -> None:
    with pytest.raises(EvalError, match=r"unknown format: html; .*Known: markdown, csv, latex"):
        export.write(runs, "html")


def test_the_picture_shows_every_run_with_its_bars(runs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "runs.png"
    plot.plot(runs, path)
    with Image.open(path) as image:
        assert image.size[0] == 1800
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    black, blue = (0, 0, 0), (0, 114, 178)
    assert min(_far(black, colour) for colour in colours) < 30
    assert min(_far(blue, colour) for colour in colours) < 60
    orange = (213, 94, 0)
    assert min(_far(orange, colour) for colour in colours) > 60, "there is no third run"


def _far(one: tuple[int, ...], two: Any) -> int:
    return sum(abs(a - b) for a, b in zip(one, two, strict=True))


def test_bars_reach_from_the_value_to_its_interval() -> None:
    values = [table.Value(0.5, 0.4, 0.75, 9), table.Value(0.2, 0.21, 0.3, 9)]
    below, above = plot._bars([(0.0, value) for value in values]) or [[], []]
    assert below == pytest.approx([10, 0]), "a value below its own interval has no bar downwards"
    assert above == pytest.approx([25, 10])
    assert plot._bars([(1.0, None)]) is None


def test_the_picture_needs_scores_and_a_format_that_is_known(
    runs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(EvalError, match="nothing to plot: the runs hold no scores"):
        plot.plot([folder(tmp_path / "empty", {})], tmp_path / "x.png")
    with pytest.raises(EvalError, match=r"--plot .*x\.docx: .*name the picture FILE\.png"):
        plot.plot(runs, tmp_path / "x.docx")


def test_without_matplotlib_the_extra_is_named(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = builtins.__import__

    def missing(name: str, *more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", missing)
    folders = [str(path) for path in runs]
    assert main(["table", *folders, "--plot", str(tmp_path / "x.png")]) == 1
    shown = capsys.readouterr()
    assert shown.err == 'error: --plot needs matplotlib: pip install -e ".[plot]"\n'
    assert main(["table", *folders, "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("run,split,measure,value,low,high,n\n")
