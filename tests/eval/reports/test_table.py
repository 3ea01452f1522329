"""The table: its cells, and what is written below it."""

from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.chair import alarm
from eval.benchmarks.registry import BENCHMARKS
from eval.errors import EvalError
from eval.reports import table
from eval.runs.config import from_settings
from eval.runs.folder import RunFolder

CHAIR = dict.fromkeys(BENCHMARKS["chair"].measures, 0.5)
POPE = dict.fromkeys(BENCHMARKS["pope"].measures, 0.75)


def chair(**values: float) -> dict[str, Any]:
    healthy = {"mean_tokens": 41.26, "no_object_share": 0.0, "looping_share": 0.0}
    values = CHAIR | healthy | values
    intervals = {key: [value - 0.1, value + 0.123] for key, value in values.items()}
    more = {"n": 200, "counts": {"captions": 200}, "flags": [], "ended_share": 1.0}
    more["alarms"] = [*alarm.ringing(values).values()]
    return {**values, "intervals": intervals, **more}


def pope(unreadable: float = 0.0) -> dict[str, Any]:
    intervals = {key: [0.7, 0.8] for key in POPE}
    more = {"n": 360, "questions": 360, "flags": [], "parser": "official", "unreadable": unreadable}
    return {**POPE, "intervals": intervals, **more}


def folder(path: Path, metrics: dict[str, Any], sha256: str = "a", **record: Any) -> Path:
    """A run folder with these metrics, as `run` leaves it."""
    path.mkdir(parents=True)
    images = {"test": {"count": 200, "sha256": sha256}}
    settings = from_settings({"splits": ["test"]}).settings()
    about = {"settings": settings, "data": {"samples": 560, "images": images}}
    RunFolder(path).write_record({**about, "environments": [], "patches": [], "notes": []} | record)
    RunFolder(path).write_metrics({"answered": 560, "skipped": 0, "samples": 560} | metrics)
    return path


def cells(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    stock = {"chair": {"test": chair(chair_s=0.385)}, "pope": {"test": {"random": pope()}}}
    gift = {"chair": {"test": chair(chair_s=0.3)}}
    folders = [folder(tmp_path / "baseline", stock), folder(tmp_path / "gift", gift)]
    text = table.markdown(folders)
    assert cells(text) == [
        ["split", "measure", "baseline", "gift"],
        [*("-" * width for width in (5, 27, 17, 17))],
        ["test", "degeneration alarm", "no", "no"],
        ["test", "CHAIR_S %", "38.5 [28.5, 50.8]", "30.0 [20.0, 42.3]"],
        ["test", "CHAIR_I %", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "CHAIR_I %, each object once", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "CHAIR_S %, first 40 words", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "CHAIR_S %, first 60 words", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "CHAIR_S %, first 100 words", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "CHAIR_I %, first 40 words", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "CHAIR_I %, first 60 words", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "CHAIR_I %, first 100 words", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "recall %", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "precision %", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "F1 %", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "length in tokens", *["41.3 [41.2, 41.4]"] * 2],
        ["test", "distinct 4-grams %", *["50.0 [40.0, 62.3]"] * 2],
        ["test", "looping %", *["0.0 [-10.0, 12.3]"] * 2],
        ["test", "naming no object %", *["0.0 [-10.0, 12.3]"] * 2],
        ["test", "POPE random, accuracy %", "75.0 [70.0, 80.0]", "-"],
        ["test", "POPE random, F1 %", "75.0 [70.0, 80.0]", "-"],
        ["test", "POPE random, answered yes %", "75.0 [70.0, 80.0]", "-"],
    ]
    assert text.startswith("Model pocket, data pocket. In brackets 95 % bootstrap intervals.")
    assert "- test: 200 captions, 360 questions a POPE strategy or 200 captions\n" in text


def test_no_chair_number_stands_without_recall_length_repetition_and_silence() -> None:
    beside = {"recall", "mean_tokens", "distinct_4gram_share", "looping_share", "no_object_share"}
    assert beside < {*BENCHMARKS["chair"].measures}


def test_the_alarm_stands_in_the_table_and_says_why(tmp_path: Path) -> None:
    silent = chair(chair_s=0.01, no_object_share=0.84)
    loops = chair(chair_s=0.2, looping_share=0.4)
    runs = {
        "healthy": chair(),
        "silent": silent,
        "loops": loops,
        "both": loops | {"no_object_share": 0.84},
    }
    folders = [folder(tmp_path / name, {"chair": {"test": score}}) for name, score in runs.items()]
    text = table.markdown([*folders, folder(tmp_path / "pope", {"pope": {"test": {}}})])
    row = next(row for row in cells(text) if row[1] == "degeneration alarm")
    assert row[2:] == ["no", "SILENCE", "LOOPING", "SILENCE, LOOPING", "-"]
    assert (
        "- silent: test, degeneration alarm, silence: 84.0 % of the captions name no object, so "
        "CHAIR_S 1.0 %, CHAIR_I 50.0 % cannot be read as an improvement"
    ) in text.splitlines()
    assert "- loops, both: test, degeneration alarm, looping: 40.0 % of the captions repeat" in text
    assert "- healthy: test, degeneration" not in text


def test_metrics_without_the_measures_of_today_are_to_be_scored_again(tmp_path: Path) -> None:
    old = {key: value for key, value in chair().items() if key != "looping_share"}
    with pytest.raises(EvalError, match=r"lacks measures: python -m eval score .*old"):
        table.markdown([folder(tmp_path / "old", {"chair": {"test": old}})])


def test_what_weakens_a_number_is_written_below(tmp_path: Path) -> None:
    cut = {"chair": {"test": {**chair(), "ended_share": 0.9, "flags": ["chair_i: nothing"]}}}
    odd = {"pope": {"test": {"random": pope(unreadable=0.25)}}, "answered": 400}
    folders = [
        folder(tmp_path / "a", cut, notes=["VAR found no sink."]),
        folder(tmp_path / "b", odd, notes=["VAR found no sink."], patches=["one", "two"]),
    ]
    lines = table.markdown(folders).splitlines()
    assert "- a, b: VAR found no sink." in lines
    assert "- a: test: 10.0 % of the captions were cut by the token limit" in lines
    assert "- a: test, chair_i: nothing" in lines
    assert "- b: incomplete, 400 of 560 samples are answered" in lines
    assert "- b: test, POPE random: 25.0 % of answers are unreadable" in lines
    assert any("described itself differently" in line for line in lines if line.startswith("- b:"))


def test_runs_on_different_images_are_marked(tmp_path: Path) -> None:
    metrics = {"chair": {"test": chair()}}
    one, two = folder(tmp_path / "a", metrics), folder(tmp_path / "b", metrics, sha256="b")
    assert "used different images" in table.markdown([one, two])
    assert "used different images" not in table.markdown([one])


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    metrics = {"chair": {"test": chair()}}
    folders = [folder(tmp_path / part / "gift", metrics) for part in ("x", "y")]
    assert cells(table.markdown(folders))[0][2:] == [str(path) for path in folders]


def test_what_is_no_scored_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="is not a run folder"):
        table.markdown([tmp_path])
    run = folder(tmp_path / "run", {})
    (run / "metrics.json").unlink()
    with pytest.raises(EvalError, match=r"no readable metrics\.json: python -m eval score .*run"):
        table.markdown([run])
    with pytest.raises(EvalError, match="no run folder given"):
        table.markdown([])


def test_what_lies_beside_the_runs_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder(tmp_path / "run", {"chair": {"test": chair()}})
    picture = tmp_path / "runs.png"
    picture.touch()
    (tmp_path / "speed").mkdir()
    begun = folder(tmp_path / "begun", {})
    (begun / "metrics.json").unlink()
    text = table.markdown([run, picture, tmp_path / "speed", begun])
    assert text == table.markdown([run])
    said = f"no scored run, left out: {picture}, {tmp_path / 'speed'}, {begun}"
    assert said in capsys.readouterr().err
    with pytest.raises(EvalError, match="none is not a run folder"):
        table.markdown([run, tmp_path / "none"])
