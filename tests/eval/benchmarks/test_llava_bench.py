"""LLaVA-Bench: marks beside those of the reference."""

import json
from pathlib import Path

import pytest

from eval.benchmarks.judge import JudgeOptions
from eval.benchmarks.llava_bench import marks, score, score_files
from eval.errors import EvalError
from tests.support.local_server import Chat


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("8 6\nThe first is better.", (8.0, 6.0)),
        ("8,6", (8.0, 6.0)),
        ("7.5, 9\n", (7.5, 9.0)),
        ("8", None),
        ("Scores: 8 6", None),
        ("1 2 3", None),
        ("", None),
    ],
)
def test_the_first_line(reply: str, expected: tuple[float, float] | None) -> None:
    assert marks(reply) == expected


def test_formulas() -> None:
    result = score([(8, 6), (10, 5), None, (6, 9)], ["conv", "detail", "conv", "conv"])
    assert result["all"]["score"] == pytest.approx(100 * 20 / 24, abs=1e-12)
    assert (result["all"]["mean_reference"], result["all"]["mean_model"]) == (8.0, 20 / 3)
    assert result["conv"]["score"] == pytest.approx(100 * 15 / 14, abs=1e-12)
    assert result["detail"]["score"] == 50.0
    assert (result["questions"], result["unmarked"]) == (4, 1)
    with pytest.raises(EvalError, match="no reply of the judge begins with two marks"):
        score([None], ["conv"])


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    one = {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "Where is it?"}
    two = {"question_id": 1, "image": "001.jpg", "category": "detail", "text": "Describe it."}
    write(folder / "questions.jsonl", one, two)
    write(folder / "context.jsonl", {"image": "001.jpg", "caption": "A crater in Hawaii."})
    references = [{"question_id": n, "text": f"Reference {n}."} for n in (0, 1)]
    write(folder / "answers_gpt4.jsonl", *references)
    return folder


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    rows = [{"question_id": n, "text": f"Answer {n}."} for n in (1, 0)]
    return write(tmp_path / "answers.jsonl", *rows)


def test_a_judge(chat: Chat, data: Path, answers: Path, tmp_path: Path) -> None:
    chat.says = lambda prompt: (200, "8 4\nok" if "Where is it?" in prompt else "8 8")
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    result = score_files(answers, data, judging=JudgeOptions(**options))  # type: ignore[arg-type]
    assert (result["all"]["score"], result["conv"]["score"]) == (75.0, 50.0)
    assert result["rules"].startswith("llava_bench.txt (sha256")
    prompt = chat.asked[0]["messages"][0]["content"]
    start = (
        "[Context]\nA crater in Hawaii.\n\n[Question]\nWhere is it?\n\n[Assistant 1]\nReference 0."
    )
    assert prompt.startswith(start)
    assert "[Assistant 2]\nAnswer 0.\n\n[End of Assistant 2]\n\n[System]\n" in prompt
    assert (chat.asked[0]["temperature"], chat.asked[0]["max_tokens"]) == (0.2, 1024)


def test_the_published_rules(chat: Chat, data: Path, answers: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rule.json"
    rules.write_text(json.dumps({"llava_bench_conv": {"role": "Assistant", "prompt": "Mark."}}))
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    with pytest.raises(EvalError, match=r"rule\.json: no rule llava_bench_detail with a prompt"):
        score_files(answers, data, rules=rules, judging=JudgeOptions(**options))  # type: ignore[arg-type]


def test_without_a_judge(data: Path, answers: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="LLaVA-Bench needs a judge"):
        score_files(answers, data)
    export = tmp_path / "official.jsonl"
    assert score_files(answers, data, export)["exported"] == 2
    first, second = map(json.loads, export.read_text().splitlines())
    assert list(first) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (first["question_id"], first["text"]) == (0, "Answer 0.")
    assert first["answer_id"] != second["answer_id"]


def test_a_missing_answer_is_named(data: Path, tmp_path: Path) -> None:
    answers = write(tmp_path / "answers.jsonl", {"question_id": 0, "text": "a"})
    with pytest.raises(EvalError, match=r"question_id does not fit .*without an answer: 1\."):
        score_files(answers, data)


def test_a_missing_context_is_named(chat: Chat, data: Path, answers: Path, tmp_path: Path) -> None:
    write(data / "context.jsonl", {"image": "002.jpg", "caption": "Another."})
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    with pytest.raises(EvalError, match=r"questions\.jsonl, line 1: context\.jsonl or"):
        score_files(answers, data, judging=JudgeOptions(**options))  # type: ignore[arg-type]
