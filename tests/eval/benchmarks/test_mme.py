"""MME: pairs of questions."""

import json
from pathlib import Path

import pytest

from eval.benchmarks.mme import (
    HALLUCINATION,
    PERCEPTION,
    Answer,
    read_folder,
    score,
    score_files,
    tally,
)
from eval.benchmarks.parsers import mme_official
from eval.errors import EvalError
from tests.support.shared_data import SHARED, shared

MME = SHARED / "mme"


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("yes, there is", "yes"),
        ("No.", "no"),
        ("None", "no"),
        ("Nope", "no"),
        (" Yes", "yes"),
        ("  No", "no"),
        ("There is no dog", None),
        ("I think yes", None),
        ("", None),
    ],
)
def test_the_first_four_characters(text: str, reading: str | None) -> None:
    assert mme_official(text) == reading


def pairs(*answers: str) -> list[Answer]:
    return [
        Answer(f"{number // 2}.jpg", "no" if number % 2 else "yes", text)
        for number, text in enumerate(answers)
    ]


def test_formulas() -> None:
    result = score({"count": pairs("Yes", "No", "Yes", "Yes", "maybe", "No", "No", "Yes")})
    count = result["subtasks"]["count"]
    assert count["counts"] == {
        "questions": 8,
        "right": 4,
        "images": 4,
        "images_right": 1,
        "points": 4 * 50 + 1 * 100,
        "unreadable": 1,
        "said_yes": 4,
    }
    assert (count["accuracy"], count["accuracy_plus"]) == (0.5, 0.25)
    assert (count["yes_ratio"], count["unreadable"]) == (0.5, 0.125)
    assert count["score"] == 75.0
    assert count["intervals"]["score"][0] < 75 < count["intervals"]["score"][1]
    assert count["intervals"]["accuracy_plus"][0] < 0.25 < count["intervals"]["accuracy_plus"][1]
    assert result["totals"] == {}


def test_a_sum_counts_every_subtask_alike_however_many_images_it_has() -> None:
    large, small = pairs("Yes", "No", "Yes", "Yes", "No", "Yes"), pairs("Yes", "No")
    alone = [tally(part).report()["score"] for part in (large, small)]
    assert alone == [pytest.approx(50 + 100 / 3), 200.0]
    assert tally(large, small).report()["score"] == pytest.approx(sum(alone))


def test_totals_need_all_their_subtasks() -> None:
    perfect = dict.fromkeys(PERCEPTION, pairs("Yes", "No"))
    assert score(perfect)["totals"] == {"hallucination": 800.0, "perception": 2000.0}
    del perfect["OCR"]
    assert score(perfect)["totals"] == {"hallucination": 800.0}
    with pytest.raises(EvalError, match="no answers"):
        score({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.jpg\tIs it?\tYes\n", r"count\.txt, line 1: 3 columns; expected image"),
        ("a.jpg\tq\tYes\tYes\na.jpg\tq\tPerhaps\tNo\n", r"line 2: the third column is 'Perhaps'"),
        ("a.jpg\tq\tYes\tYes\nb.jpg\tq\tNo\tNo\n", r"line 2: b\.jpg does not pair with a\.jpg"),
        ("a.jpg\tq\tYes\tYes\n", r"count\.txt: 1 lines; expected pairs"),
        ("", r"count\.txt: the file is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "count.txt").write_text(content)
    with pytest.raises(EvalError, match=message):
        read_folder(tmp_path)


def test_a_folder_without_answers(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no file of MME in it\. Expected SUBTASK\.txt"):
        read_folder(tmp_path)


@pytest.mark.parametrize("model", ["answers_lavin", "answers_llava-v1.5-7b"])
@shared
def test_the_published_scores_to_the_last_digit(model: str) -> None:
    expected = json.loads((SHARED / "reference_scores.json").read_text())["mme"][model]
    result = score_files(MME / model)
    assert set(result["subtasks"]) == set(HALLUCINATION)
    for name, part in result["subtasks"].items():
        assert part["accuracy"] == expected[name]["acc"]
        assert part["accuracy_plus"] == expected[name]["acc_plus"]
        assert part["score"] == pytest.approx(expected[name]["score"], abs=1e-12)
    total = expected["hallucination_subset_total"]
    assert result["totals"] == {"hallucination": pytest.approx(total, abs=1e-12)}
