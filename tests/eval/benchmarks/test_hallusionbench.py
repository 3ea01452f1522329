"""HallusionBench: groups of questions."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.hallusionbench import Question, repeated, score, verdict, verdict_of
from eval.benchmarks.hallusionbench.diagnosis import (
    LANGUAGE,
    MIXED,
    RIGHT,
    UNCLEAR,
    VISUAL,
    WRONG,
    diagnose,
)
from eval.benchmarks.hallusionbench.files import score_files
from eval.benchmarks.judge import TemplateOptions
from eval.errors import EvalError
from tests.support.local_server import Chat
from tests.support.shared_data import SHARED, shared

HALLUSION = SHARED / "hallusionbench"


def question(category: str, figure: str, number: str, visual: str, label: str = "yes") -> Question:
    return Question(category, "chart", "0", figure, number, visual, "Is it?", "It is.", label)


# two questions on no figure, on the original and on an edited one
SET = [
    question("VS", "0", "0", "0"),
    question("VS", "0", "1", "0", "no"),
    question("VS", "1", "0", "1"),
    question("VS", "1", "1", "1", "no"),
    question("VS", "2", "0", "2", "no"),
    question("VS", "2", "1", "2"),
]


def test_formulas() -> None:
    result = score(SET, [UNCLEAR, WRONG, RIGHT, RIGHT, RIGHT, UNCLEAR])
    assert result["a_acc"] == 4 / 6  # unsure without a figure is right, with one it is wrong
    assert result["q_acc"] == 1 / 2  # question 0 on all three
    assert result["f_acc"] == 1 / 2  # of the two figures; none is no figure
    assert (result["easy_a_acc"], result["hard_a_acc"]) == (3 / 4, 1 / 2)
    assert (result["easy_q_acc"], result["hard_q_acc"]) == (1 / 2, 1 / 2)
    assert (result["figures_inconsistent"], result["figures_wrong"]) == (1 / 2, 0.0)
    assert result["unclear"] == 2 / 6
    # right: yes, yes, no, no; wrong: "no" (label no, so yes) and yes (so no); labels: 3 of 6 yes
    assert result["yes_bias"] == (3 - 3) / 6
    assert result["false_yes"] == 1 / 2


@pytest.mark.parametrize(
    ("category", "value", "first", "same", "kind"),
    [
        ("VD", RIGHT, None, False, ""),
        ("VD", WRONG, None, False, VISUAL),
        ("VD", UNCLEAR, None, False, VISUAL),
        ("VD", WRONG, RIGHT, True, MIXED),
        ("VD", WRONG, RIGHT, False, VISUAL),
        ("VD", UNCLEAR, RIGHT, True, VISUAL),
        ("VD", WRONG, WRONG, True, VISUAL),
        ("VS", WRONG, None, False, LANGUAGE),
        ("VS", UNCLEAR, None, False, ""),
        ("VS", WRONG, WRONG, True, LANGUAGE),
        ("VS", WRONG, WRONG, False, MIXED),
        ("VS", UNCLEAR, WRONG, True, MIXED),
        ("VS", WRONG, RIGHT, False, VISUAL),
        ("VS", WRONG, UNCLEAR, False, VISUAL),
        ("VS", UNCLEAR, RIGHT, False, VISUAL),
    ],
)
def test_the_tree_of_diagnoses(
    category: str, value: int, first: int | None, same: bool, kind: str
) -> None:
    assert diagnose(category, value, first, same) == kind


def test_diagnoses_of_a_set() -> None:
    """By hand: the answers without a figure are wrong and right; five of six fail."""
    said = ["No", "No", "No", "Yes", "Maybe", "No"]
    same = repeated(SET, said)
    assert same == {SET[2].key, SET[5].key}
    verdicts = [verdict(text, q.label) for text, q in zip(said, SET, strict=True)]
    assert verdicts == [WRONG, RIGHT, WRONG, WRONG, UNCLEAR, WRONG]
    result = score(SET, verdicts, same)
    shares = [result[kind] for kind in (LANGUAGE, VISUAL, MIXED)]
    assert shares == [2 / 5, 2 / 5, 1 / 5]
    assert (result["counts"]["diagnosed"], result["counts"]["undiagnosed"]) == (5, 0)
    seen = score(SET[2:], verdicts[2:])
    assert (seen["counts"]["diagnosed"], seen["counts"]["undiagnosed"]) == (0, 4)
    assert seen["flags"] == [
        "4 failures have no diagnosis: their questions' first form was not asked"
    ]
    assert "flags" not in result


def test_a_judge_holds_two_answers_together_where_it_matters(chat: Chat, tmp_path: Path) -> None:
    """An original that is right, and two edited figures of which one answer is wrong."""
    figures = [ROW, ROW | {"figure_id": "1", "visual_input": "2", "gt_answer": "0"}]
    figures.append(figures[1] | {"figure_id": "2", "gt_answer": "1"})
    answers, questions = tmp_path / "answers.json", tmp_path / "questions.json"
    questions.write_text(json.dumps(figures))
    given = ["Of one size.", "Equal again.", "Still equal."]
    rows = [r | {"model_prediction": text} for r, text in zip(figures, given, strict=True)]
    answers.write_text(json.dumps(rows))
    chat.says = lambda prompt: (
        (200, "same") if "one student" in prompt else (200, "in" * ("again" in prompt) + "correct")
    )
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    result = score_files(answers, questions, judging=TemplateOptions(**options))  # type: ignore[arg-type]
    assert (result[MIXED], result["counts"]["diagnosed"]) == (1.0, 1)
    asked = [request["messages"][0]["content"] for request in chat.asked]
    assert len(asked) == 4, "three verdicts, and one comparison"
    assert "First answer: Of one size." in asked[3]
    assert "Second answer: Equal again." in asked[3]
    assert result["same_template"].startswith("hallusionbench_same.txt")
    assert (
        score_files(answers, questions, judging=TemplateOptions(verdicts=tmp_path / "v.jsonl"))[
            MIXED
        ]
        == 1.0
    )
    chat.says = lambda prompt: (200, "different" if "one student" in prompt else "incorrect")
    options["verdicts"] = tmp_path / "w.jsonl"
    assert score_files(answers, questions, judging=TemplateOptions(**options))[VISUAL] == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("Yes, it is.", "yes", RIGHT),
        ("No.", "yes", WRONG),
        ("There is no sign of it", "no", RIGHT),
        ("I cannot tell", "no", UNCLEAR),
    ],
)
def test_without_a_judge(answer: str, label: str, expected: int) -> None:
    assert verdict(answer, label) == expected


def test_the_reply_of_a_judge() -> None:
    replies = ["Correct.", "incorrect", "This is INCORRECT", "unclear", ""]
    assert [verdict_of(reply) for reply in replies] == [RIGHT, WRONG, WRONG, UNCLEAR, UNCLEAR]


@pytest.mark.parametrize(
    ("questions", "verdicts", "message"),
    [
        ([], [], "0 verdicts for 0 questions"),
        (SET, [RIGHT], "1 verdicts for 6 questions"),
        ([SET[0], SET[0]], [RIGHT, RIGHT], "answered more than once"),
    ],
)
def test_bad_input(questions: list[Question], verdicts: list[int], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        score(questions, verdicts)


ROW = {
    "category": "VD",
    "subcategory": "illusion",
    "visual_input": "1",
    "set_id": "0",
    "figure_id": "0",
    "question_id": "0",
    "question": "Are they of one size?",
    "gt_answer_details": "They are.",
    "gt_answer": "1",
}


def files(tmp_path: Path, row: dict[str, Any], answer: dict[str, Any]) -> tuple[Path, Path]:
    answers, questions = tmp_path / "answers.json", tmp_path / "questions.json"
    answers.write_text(json.dumps([answer]))
    questions.write_text(json.dumps([row]))
    return answers, questions


def test_with_a_judge(chat: Chat, tmp_path: Path) -> None:
    given = files(tmp_path, ROW, {**ROW, "model_prediction": "Both look alike."})
    assert score_files(*given)["a_acc"] == 0.0
    chat.says = lambda prompt: (200, "correct")
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    result = score_files(*given, judging=TemplateOptions(**options))  # type: ignore[arg-type]
    assert (result["a_acc"], result["judge"]) == (1.0, "j")
    assert result["template"].startswith("hallusionbench.txt (sha256")
    prompt = chat.asked[0]["messages"][0]["content"]
    assert "Are they of one size?" in prompt
    assert "They are." in prompt
    assert "Both look alike." in prompt
    again = score_files(*given, judging=TemplateOptions(verdicts=tmp_path / "v.jsonl"))
    assert again["a_acc"] == 1.0
    assert len(chat.asked) == 1


@pytest.mark.parametrize(
    ("changes", "answer", "message"),
    [
        ({"gt_answer": "yes"}, {}, r"questions\.json, entry 1: .*'gt_answer' is 'yes'; expected"),
        ({}, {"set_id": "9"}, r"answers\.json, entry 1: question VD/illusion/9/0/0 is not in"),
        ({}, {"model_prediction": None}, r"entry 1: the field 'model_prediction' is NoneType"),
    ],
)
def test_a_bad_row_is_named(
    tmp_path: Path, changes: dict[str, Any], answer: dict[str, Any], message: str
) -> None:
    given = files(tmp_path, ROW | changes, ROW | {"model_prediction": "Yes"} | answer)
    with pytest.raises(EvalError, match=message):
        score_files(*given)


@shared
def test_the_groups_of_the_published_questions(tmp_path: Path) -> None:
    rows = json.loads((HALLUSION / "HallusionBench.json").read_text())
    answers = tmp_path / "answers.json"
    given = [
        {**row, "model_prediction": "Yes" if row["gt_answer"] == "1" else "No"} for row in rows
    ]
    answers.write_text(json.dumps(given))
    result = score_files(answers, HALLUSION / "HallusionBench.json")
    counts = result["counts"]
    assert (counts["questions"], counts["pairs"], counts["figures"]) == (1129, 455, 346)
    assert (counts["easy_questions"], counts["hard_questions"]) == (625, 504)
    assert result["a_acc"] == result["q_acc"] == result["f_acc"] == 1.0
    assert result["yes_bias"] == 0.0


@shared
def test_published_predictions() -> None:
    result = score_files(
        HALLUSION / "HallusionBench_result_sample.json", HALLUSION / "HallusionBench.json"
    )
    assert (result["answered"], result["all_questions"]) == (254, 1129)
    rows = json.loads((HALLUSION / "HallusionBench_result_sample.json").read_text())
    plain = [row for row in rows if row["model_prediction"].startswith(("Yes", "No"))]
    assert len(plain) <= len(rows) - result["counts"]["unclear"] < len(rows)
    assert 0 < result["q_acc"] < result["a_acc"] < 1
