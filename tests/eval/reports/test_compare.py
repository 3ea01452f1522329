"""Two runs in pairs: what changed, whether it could be chance, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.__main__ import main
from eval.benchmarks.intervals import paired
from eval.errors import EvalError
from eval.reports import compare
from eval.runs import runner
from eval.runs.config import from_settings
from eval.runs.folder import RunFolder
from vlm_patch.models.chat import GREEDY

Edit = Callable[[dict[str, Any]], None]
TRUTH = {1: ["dog"], 2: ["cup", "dog"], 3: ["person"]}
STOCK = {1: "A dog and a cat.", 2: "A cup.", 3: "A person."}
CALM = {1: "A dog.", 2: "A cup.", 3: "It is a wall."}
YES = {"dog": "yes", "cup": "yes"}


def folder(
    path: Path,
    captions: dict[int, str],
    answers: dict[str, str],
    edit: Edit = lambda _: None,
    skipped: tuple[int, ...] = (),
    **changes: Any,
) -> Path:
    """A finished run: one caption an image, and two POPE questions about image 1."""
    settings = from_settings({"splits": ["test"]} | changes).settings()
    images = {"test": {"count": 3, "sha256": "a"}}
    about = {"settings": settings, "data": {"samples": 5, "images": images}}
    record = about | {"decoding": dict(GREEDY), "environments": [], "patches": [], "notes": []}
    rows = [
        {
            **{"task": "chair", "split": "test", "id": str(n), "image": f"{n}.png"},
            **{"prompt": "Describe.", "answer": text, "ended": True},
            **{"image_id": n, "truth": TRUTH[n]},
        }
        for n, text in captions.items()
    ]
    rows += [
        {
            **{"task": "pope", "split": "test", "id": f"random-{n}", "image": "1.png"},
            **{"prompt": f"A {thing}?", "answer": answer, "ended": True},
            **{"strategy": "random", "label": "yes" if thing == "dog" else "no"},
        }
        for n, (thing, answer) in enumerate(answers.items())
    ]
    run = RunFolder(path)
    path.mkdir(parents=True)
    edit(record)
    for row in rows:
        edit(row)
    kept = [row for row in rows if row.get("image_id") not in skipped]
    asked = ("task", "split", "id", "image")
    left = [
        {key: row[key] for key in asked} | {"reason": "broken"}
        for row in rows
        if row.get("image_id") in skipped
    ]
    run.write_record(record)
    run.answers.write_text("".join(json.dumps(row) + "\n" for row in kept))
    run.skip_list.write_text("".join(json.dumps(row) + "\n" for row in left))
    runner.score(path)
    return path


def test_values_and_differences_are_those_of_the_runs(tmp_path: Path) -> None:
    one = folder(tmp_path / "stock", STOCK, YES)
    two = folder(tmp_path / "calm", CALM, {"dog": "yes", "cup": "no"})
    found = compare.compare(one, two)
    chair, pope = found["chair"]["test"], found["pope"]["test"]["random"]
    for path, side in ((one, "before"), (two, "after")):
        metrics = json.loads((path / "metrics.json").read_text())
        scores = metrics["chair"]["test"], metrics["pope"]["test"]["random"]
        for key in ("chair_s", "chair_i", "recall", "f1", "mean_tokens", "chair_i_at_40"):
            assert chair[key][side] == scores[0][key]
        for key in ("accuracy", "f1", "yes_ratio"):
            assert pope[key][side] == scores[1][key]
    assert chair["n"] == 3
    assert chair["chair_s"]["difference"] == pytest.approx(-1 / 3)
    assert chair["recall"]["difference"] == pytest.approx(-1 / 4)
    low, high = chair["chair_s"]["interval"]
    assert (low, high) == (-1.0, 0.0), "the one caption that changed is drawn never to always"
    assert pope["n"] == 2
    assert pope["accuracy"]["difference"] == 0.5
    assert pope["mcnemar"] == {"turned_right": 1, "turned_wrong": 0, "p": 1.0}
    assert found["unpaired"] == 0
    assert found == compare.compare(one, two), "seeded"


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", STOCK, YES)
    two = folder(tmp_path / "b", STOCK, YES, batch_size=3, methods=["vhr"])
    found = compare.compare(one, two)
    for change in (found["chair"]["test"], found["pope"]["test"]["random"]):
        for key, value in change.items():
            if key not in ("n", "mcnemar"):
                assert value["difference"] == 0.0
                assert value["interval"] == [0.0, 0.0]
    assert found["warnings"] == []


def test_pairing_cancels_what_both_runs_share() -> None:
    """Against theory: 200 samples of which 20 turn from 1 to 0, so the mean difference is -0.1."""
    generator = np.random.default_rng(0)
    before = generator.integers(0, 2, 400).astype(float)
    after = before.copy()
    after[np.flatnonzero(before)[:40]] = 0
    ones = np.ones(400)
    change = paired(
        {"hits": before, "n": ones},
        {"hits": after, "n": ones},
        lambda c: {"rate": (c["hits"], c["n"])},
    )["rate"]
    assert change["difference"] == pytest.approx(-0.1)
    half = 1.96 * math.sqrt(0.1 * 0.9 / 400)
    assert change["interval"] == pytest.approx([-0.1 - half, -0.1 + half], abs=0.005)


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 2 / 64),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(better: int, worse: int, p: float) -> None:
    """Worked by hand: twice the tail of Binomial(changed, 1/2), at most 1."""
    before = np.array([0.0] * better + [1.0] * worse + [1.0] * 7 + [0.0] * 3)
    after = np.array([1.0] * better + [0.0] * worse + [1.0] * 7 + [0.0] * 3)
    found = compare.mcnemar(before, after)
    assert (found["turned_right"], found["turned_wrong"]) == (better, worse)
    assert found["p"] == pytest.approx(p, abs=1e-15)


def test_mcnemar_of_thousands_of_changes_does_not_overflow() -> None:
    found = compare.mcnemar(np.repeat([1.0, 0.0], 3000), np.repeat([0.0, 1.0], 3000))
    assert found["p"] == 1.0


def test_a_chair_gain_that_is_paid_for_is_said(tmp_path: Path) -> None:
    """All captions shorter and less is named: recall falls for certain in every draw."""
    long = {n: f"A {truth[0]} and a bench on a wall." for n, truth in TRUTH.items()}
    short = dict.fromkeys(TRUTH, "A wall.")
    one, two = folder(tmp_path / "a", long, YES), folder(tmp_path / "b", short, YES)
    (warning,) = compare.compare(one, two)["warnings"]
    paid = "recall went down and captions got shorter and more captions name nothing"
    assert warning.startswith(f"test: CHAIR fell while {paid}; captions that say less")
    assert compare.compare(two, one)["warnings"] == []


def test_samples_that_one_run_skipped_are_left_out_and_said(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", STOCK, YES)
    two = folder(tmp_path / "b", STOCK, YES, skipped=(2,))
    found = compare.compare(one, two)
    assert found["unpaired"] == 1
    assert found["chair"]["test"]["n"] == 2
    assert "1 samples were skipped by one of the runs" in compare.markdown(found)


def changed(key: str, value: Any, of: str = "chair") -> Edit:
    def edit(row: dict[str, Any]) -> None:
        if row.get("task") == of:
            row[key] = value if not isinstance(value, dict) else value.get(row["id"], row[key])

    return edit


def decoding(record: dict[str, Any]) -> None:
    if "decoding" in record:
        record["decoding"]["num_beams"] = 5


@pytest.mark.parametrize(
    ("edit", "changes", "reason"),
    [
        (changed("prompt", "Say it."), {}, r"the prompts of chair differ, .*'Describe\.' and 'Say"),
        (changed("prompt", "A hat?", "pope"), {}, r"the prompts of pope differ, .*'A dog\?' and"),
        (changed("id", {"1": "9"}), {}, "the prompts of chair differ"),
        (
            changed("image", {"1": "7.png"}),
            {},
            r"the images of chair differ \(3 and 3, 2 in common\)",
        ),
        (changed("truth", {"2": ["bed"]}), {}, "the annotations behind chair differ"),
        (changed("split", "break"), {}, "the images of chair differ"),
        (decoding, {}, r"decoding is {.*'num_beams': 1.*} and {.*'num_beams': 5"),
        (lambda _: None, {"chair": {"max_new_tokens": 64}}, "limit of chair is 512 and 64 tokens"),
        (lambda _: None, {"pope": {"max_new_tokens": 3}}, "limit of pope is 10 and 3 tokens"),
        (lambda _: None, {"chat_template": "x"}, "are rendered by chat_template None and 'x'"),
        (
            lambda _: None,
            {"pope": {"parser": "strict"}},
            "pope is read by the official parser and by the strict parser",
        ),
    ],
)
def test_runs_that_were_asked_different_things_are_refused(
    edit: Edit, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    one = folder(tmp_path / "a", STOCK, YES)
    two = folder(tmp_path / "b", STOCK, YES, edit, **changes)
    with pytest.raises(EvalError, match=rf"a and .*b cannot be compared: .*{reason}"):
        compare.compare(one, two)


def test_all_reasons_are_said_at_once(tmp_path: Path) -> None:
    limits = {"chair": {"max_new_tokens": 64}, "pope": {"max_new_tokens": 3}}
    one = folder(tmp_path / "a", STOCK, YES)
    two = folder(tmp_path / "b", STOCK, YES, decoding, **limits)
    with pytest.raises(EvalError) as caught:
        compare.compare(one, two)
    assert str(caught.value).count(";") == 2


def test_other_scorers_and_other_tasks_are_refused(
    tmp_path: Path,
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("cup, mug\n")
    one = folder(tmp_path / "a", STOCK, YES)

    def own_words(record: dict[str, Any]) -> None:
        if "settings" in record:
            (tmp_path / "b" / "words.txt").write_text(words.read_text())
            record["settings"]["chair"]["synonyms"] = str(words)

    two = folder(tmp_path / "b", STOCK, YES, own_words)
    with pytest.raises(EvalError, match=r"chair is read by pattern rules with coco.* and by .*wor"):
        compare.compare(one, two)
    captions, questions = folder(tmp_path / "c", STOCK, {}, _samples(3)), tmp_path / "d"
    folder(questions, {}, YES, _samples(2))
    with pytest.raises(EvalError, match="they have no task in common"):
        compare.compare(captions, questions)
    assert [*compare.compare(one, captions)][2:] == ["unpaired", "chair", "warnings"]


def _samples(count: int) -> Edit:
    def edit(record: dict[str, Any]) -> None:
        if "data" in record:
            record["data"]["samples"] = count

    return edit


def test_a_run_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", STOCK, YES)
    two = folder(tmp_path / "b", STOCK, YES, _samples(9))
    with pytest.raises(EvalError, match=r"b is not complete \(5 of 9 samples are answered\)"):
        compare.compare(one, two)


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(folder(tmp_path / "a", STOCK, YES))
    two = str(folder(tmp_path / "b", CALM, {"dog": "yes", "cup": "no"}))
    assert main(["compare", one, two, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compare.compare(Path(one), Path(two))
    assert main(["compare", one, two]) == 0
    shown = capsys.readouterr().out
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert ["test", "CHAIR_S %", "33.3", "0.0", "-33.3 [-100.0, +0.0]", ""] in cells
    accuracy = ["test", "POPE random, accuracy %", "50.0", "100.0", "+50.0 [+50.0, +50.0] *"]
    assert [*accuracy, "+1 -0, p = 1"] in cells
    assert main(["compare", one, str(tmp_path / "none")]) == 1
    assert "is not a run folder" in capsys.readouterr().err
