"""MMHal-Bench: ratings, and the prompt of the judge."""

import json
from pathlib import Path

import pytest

from eval.benchmarks.judge import TemplateOptions
from eval.benchmarks.mmhal import rating, score, score_files
from eval.errors import EvalError
from tests.support.local_server import Chat
from tests.support.shared_data import SHARED, shared

TEMPLATE = SHARED / "mmhal" / "mmhal-bench_answer_template.json"
ROW = {
    "question_type": "attribute",
    "image_content": ["Fire hydrant", "Tree"],
    "question": "What color?",
    "gt_answer": "Yellow.",
    "model_answer": "Red.",
}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("It is wrong.\n- Rating: 2, very informative", 2),
        ("RATING: 6", 6),
        ("Rating: 7", None),
        ("Rating: 1 or rating: 2", None),
        ("good", None),
    ],
)
def test_ratings(reply: str, expected: int | None) -> None:
    assert rating(reply) == expected


def test_formulas() -> None:
    result = score([6, 3, 2, None], ["a", "b", "a", "b"])
    assert result["mean_rating"] == 11 / 4
    assert result["hallucination_rate"] == 0.5
    assert result["informativeness"] == pytest.approx((1 + 0 + 2 / 3 + 0) / 4, abs=1e-15)
    assert result["unrated"] == 0.25
    assert result["types"] == {"a": 4.0, "b": 1.5}
    with pytest.raises(EvalError, match="1 ratings for 0 questions"):
        score([1], [])


def test_a_judge(chat: Chat, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([ROW, {**ROW, "model_answer": "Blue."}]))
    chat.says = lambda prompt: (200, "Rating: 0" if "Blue." in prompt else "Rating: 5")
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    result = score_files(answers, judging=TemplateOptions(**options))  # type: ignore[arg-type]
    assert (result["mean_rating"], result["hallucination_rate"]) == (2.5, 0.5)
    assert result["template"].startswith("mmhal.txt (sha256")
    prompt = chat.asked[0]["messages"][0]["content"]
    for part in ("Fire hydrant, Tree", "What color?", "Yellow.", "Red."):
        assert part in prompt
    assert chat.asked[0]["temperature"] == 0


def test_without_a_judge(tmp_path: Path) -> None:
    answers, export = tmp_path / "answers.jsonl", tmp_path / "official.json"
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{**ROW, "model_answer": ""}]))
    answers.write_text('{"answer": "Green."}\n')
    with pytest.raises(EvalError, match=r"needs a judge, and none is named: --judge URL"):
        score_files(answers, questions)
    assert score_files(answers, questions, export)["exported"] == 1
    assert json.loads(export.read_text()) == [{**ROW, "model_answer": "Green."}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"answer": "a"}\n{"answer": "b"}\n', "has 2 answers, .* 1 questions"),
        ('{"answer": " "}\n', r"answers\.jsonl, line 1: the answer is empty"),
        ('{"reply": "a"}\n', r"answers\.jsonl, line 1: no field .*'model_answer' or"),
    ],
)
def test_bad_answers_are_named(tmp_path: Path, content: str, message: str) -> None:
    answers, questions = tmp_path / "answers.jsonl", tmp_path / "questions.json"
    questions.write_text(json.dumps([ROW]))
    answers.write_text(content)
    with pytest.raises(EvalError, match=message):
        score_files(answers, questions, tmp_path / "out.json")


@shared
def test_the_96_published_questions(chat: Chat, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(f'{{"answer": "Answer {number}."}}\n' for number in range(96)))
    chat.says = lambda prompt: (200, "Rating: 4")
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    result = score_files(answers, TEMPLATE, judging=TemplateOptions(**options))  # type: ignore[arg-type]
    assert (result["answers"], result["mean_rating"]) == (96, 4.0)
    order = "attribute adversarial comparison counting relation environment holistic other"
    assert list(result["types"]) == order.split()
