"""MMVP: options and pairs."""

from pathlib import Path

import pytest

from eval.benchmarks.judge import TemplateOptions
from eval.benchmarks.mmvp import chosen, read_questions, score, score_files
from eval.errors import EvalError
from tests.support.local_server import Chat

OPTIONS = {"a": "Open", "b": "Closed"}
QUESTIONS = """Index,Question,Options,Correct Answer
1,"Are the wings, seen here, open?",(a) Open (b) Closed,(a)
2,Are the wings open?,(a) Open (b) Closed,(b)
3,Is it day?,(a) Yes (b) No,(a)
4,Is it day?,(a) Yes (b) No,(b)
"""


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(a)", "a"),
        ("(B) Closed", "b"),
        ("The answer is (a).", "a"),
        ("(a) or (b)", None),
        ("A", "a"),
        ("b.", "b"),
        ("A. Open", "a"),
        ("Answer: B", "b"),
        ("A butterfly with closed wings", "b"),
        ("They are open.", "a"),
        ("Open or closed", None),
        ("An opening", None),
        ("", None),
    ],
)
def test_the_chosen_option(answer: str, letter: str | None) -> None:
    assert chosen(answer, OPTIONS) == letter


def test_pairs() -> None:
    result = score([True, True, True, False, None, True])
    assert result["pair_accuracy"] == 1 / 3
    assert result["accuracy"] == 4 / 6
    assert result["unreadable"] == 1 / 6
    for bad in ([], [True]):
        with pytest.raises(EvalError, match="expected pairs"):
            score(bad)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "Questions.csv"
    path.write_text("\ufeff" + QUESTIONS)
    return path


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    rows = [(2, "(b)"), (1, "It is open"), (4, "Yes"), (3, "Yes.")]
    lines = [f'{{"question_id": {number}, "response": "{text}"}}\n' for number, text in rows]
    path.write_text("".join(lines))
    return path


def test_files(questions: Path, answers: Path) -> None:
    result = score_files(answers, questions)
    assert (result["pair_accuracy"], result["accuracy"]) == (0.5, 0.75)
    assert result["variant"] == "letters"


def test_the_corrected_labels(tmp_path: Path) -> None:
    """Of lmms-eval: two pairs whose labels stand the wrong way round."""
    path = tmp_path / "Questions.csv"
    lines = [f"{n},Is it?,(a) Yes (b) No,({'ab'[1 - n % 2]})\n" for n in range(1, 301)]
    path.write_text(QUESTIONS.partition("\n")[0] + "\n" + "".join(lines))
    published, corrected = (read_questions(path, labels) for labels in ("published", "corrected"))
    differing = [
        (mine.index, mine.label, other.label)
        for mine, other in zip(published, corrected, strict=True)
        if mine.label != other.label
    ]
    assert differing == [(99, "a", "b"), (100, "b", "a"), (279, "a", "b"), (280, "b", "a")]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(f'{{"question_id": {q.index}, "response": "({q.label})"}}\n' for q in corrected)
    )
    scored = [score_files(answers, path, labels=labels) for labels in ("published", "corrected")]
    assert [found["pair_accuracy"] for found in scored] == [148 / 150, 1.0]
    assert [found["labels"] for found in scored] == ["published", "corrected"]
    with pytest.raises(EvalError, match="labels 'mine': expected one of published, corrected"):
        read_questions(path, "mine")


def test_a_judge(chat: Chat, questions: Path, answers: Path, tmp_path: Path) -> None:
    chat.says = lambda prompt: (200, "No." if "Is it day?" in prompt else "Yes")
    options = {"judge": chat.url, "judge_model": "j", "verdicts": tmp_path / "v.jsonl"}
    result = score_files(answers, questions, judging=TemplateOptions(**options))  # type: ignore[arg-type]
    assert (result["pair_accuracy"], result["accuracy"]) == (0.5, 0.5)
    assert (result["variant"], result["judge"]) == ("judge", "j")
    prompt = chat.asked[0]["messages"][0]["content"]
    assert "(a) Open (b) Closed" in prompt
    assert "Correct option: (a) Open" in prompt
    assert "It is open" in prompt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Index,Question,Options\n", r"no column 'Correct Answer'; found Index, Question, Options"),
        (QUESTIONS.replace("(b)\n3", "(c)\n3"), r"Questions\.csv, row 2: .*Correct Answer '\(c\)'"),
        (QUESTIONS.replace("(a) Yes (b) No,(a)", "yes no,(a)"), r"row 3: .*Options 'yes no'"),
    ],
)
def test_a_bad_question_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "Questions.csv"
    path.write_text(content)
    with pytest.raises(EvalError, match=message):
        read_questions(path)


def test_a_missing_answer_is_named(questions: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 1, "response": "(a)"}\n')
    with pytest.raises(EvalError, match=r"question_id does not fit .*without an answer: 2, 3, 4"):
        score_files(path, questions)
