"""Scoring files that somebody else wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.chair.files import score_files as score_chair
from eval.benchmarks.pope.files import score_files as score_pope
from eval.cli.function import print_result
from eval.errors import EvalError
from tests.support.shared_data import SHARED, shared


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    path = tmp_path / "objects.json"
    path.write_text('{"1": ["dog"], "2": ["cup"], "3": ["person"]}')
    return path


ROWS = [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A cup and a cat."}]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        "\n".join(map(json.dumps, ROWS)),
        "\n\n".join(map(json.dumps, ROWS)) + "\n\n",
        "\r\n".join(map(json.dumps, ROWS)),
        "\ufeff" + "\n".join(map(json.dumps, ROWS)),
        json.dumps({"overall": {"Bleu_1": 0.5}, "imgToEval": dict(enumerate(ROWS))}),
        json.dumps({"imgToEval": {"1": {"caption": "A dog."}, "2": ROWS[1]}}),
        json.dumps([{"image_id": "000000000001.jpg", "text": "A dog."}, ROWS[1]]),
        json.dumps([{"image": "COCO_val2014_000000000001.jpg", "text": "A dog."}, ROWS[1]]),
        json.dumps([{"question_id": 1, "text": "A dog."}, ROWS[1]]),
        json.dumps([{"question_id": 7, "image_id": 1, "text": "A dog."}, ROWS[1]]),
    ],
)
def test_every_form_of_caption_file(tmp_path: Path, truth: Path, content: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content, encoding="utf-8")
    result = score_chair(path, truth)
    assert (result["chair_s"], result["chair_i"]) == (0.5, pytest.approx(1 / 3))
    assert result["counts"]["gt_objects"] == 2


def test_a_single_json_line(tmp_path: Path, truth: Path) -> None:
    assert score_chair(lines(tmp_path / "one.jsonl", ROWS[1]), truth)["chair_s"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "captions.jsonl: the file is empty"),
        (" \n", "captions.jsonl: the file is empty"),
        ("[]", "captions.jsonl: the file holds no rows"),
        (
            '{"image_id": 1, "caption": "a"}\n{"image_id": 2, "capt',
            "captions.jsonl, line 2: broken",
        ),
        ('[{"image_id": 1},\n {"image_id" 2}]', "captions.jsonl, line 2: broken JSON"),
        (
            '{"image_id": 1, "sentence": "a"}',
            "line 1: no field .*'caption' or 'text' or 'answer'; found image_id",
        ),
        ('[{"caption": "a", "id": 1}]', "entry 1: no field 'image_id' or .*; found caption, id"),
        ('{"image_id": 1, "caption": null}', "line 1: the field 'caption' is NoneType"),
        (
            '{"image_id": "cat.jpg", "caption": "a"}',
            "line 1: image id 'cat.jpg': expected an integer",
        ),
        ("[3]", "entry 1: expected a JSON object, found int"),
        (
            '{"image_id": 1, "caption": "a"}\n{"image_id": 99, "caption": "a"}',
            r"captions.jsonl, line 2: image 99 is not in the truth .*objects.json",
        ),
    ],
)
def test_a_bad_caption_file_is_named(
    tmp_path: Path, truth: Path, content: str, message: str
) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(content)
    with pytest.raises(EvalError, match=message):
        score_chair(path, truth)


def test_files_that_are_not_there(tmp_path: Path, truth: Path) -> None:
    with pytest.raises(EvalError, match=r"nothing.json: no such file"):
        score_chair(tmp_path / "nothing.json", truth)
    with pytest.raises(EvalError, match=r"cannot be read"):
        score_chair(tmp_path, truth)
    captions = lines(tmp_path / "captions.jsonl", *ROWS)
    with pytest.raises(EvalError, match=r"words.txt: no such file"):
        score_chair(captions, truth, tmp_path / "words.txt")


def test_unknown_rules(tmp_path: Path, truth: Path) -> None:
    with pytest.raises(EvalError, match="rules 'lemma': expected pattern or wordnet"):
        score_chair(lines(tmp_path / "captions.jsonl", *ROWS), truth, rules="lemma")


def test_a_synonym_list_scores_and_is_named(tmp_path: Path, truth: Path) -> None:
    words = tmp_path / "my_words.txt"
    words.write_text("dog\ncup\n")
    result = score_chair(lines(tmp_path / "captions.jsonl", *ROWS), truth, words)
    assert result["chair_s"] == 0.0  # this list knows no cat
    assert result["vocabulary"].startswith("my_words.txt (sha256 ")


QUESTIONS = [
    {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "label": "yes"}
    | {"text": "Is there a dog in the image?"},
    {"question_id": 2, "image": "COCO_val2014_000000000001.jpg", "label": "no"}
    | {"text": "Is there an apple in the image?"},
]


@pytest.mark.parametrize(
    "answers",
    [
        [{"question": QUESTIONS[0]["text"], "answer": "Yes"}, {"answer": "No, there is not."}],
        [
            {"question_id": 8, "prompt": "Is there a dog in the imange?", "text": "Yes"},
            {
                "question_id": 9,
                "prompt": "Is there an apple in the image?\nOne word.",
                "text": "No",
            },
        ],
        [{"query": "Is there a dog in the image?", "ans": "Yes"}, {"ans": "No"}],
        [{"image": "000000000001.jpg", "answer": "Yes"}, {"image": "", "answer": "No"}],
    ],
)
def test_every_form_of_answer_file(tmp_path: Path, answers: list[dict[str, Any]]) -> None:
    asked = lines(tmp_path / "questions.json", *QUESTIONS)
    result = score_pope(lines(tmp_path / "answers.jsonl", *answers), asked)
    assert [result[name] for name in ("tp", "fp", "tn", "fn")] == [1, 0, 1, 0]
    assert result["accuracy"] == 1.0
    assert "splits" not in result


def test_splits_of_one_file(tmp_path: Path) -> None:
    rows = [row | {"category": name} for name in ("random", "popular") for row in QUESTIONS]
    answers = [{"text": text} for text in ("Yes", "No", "Yes", "Yes")]
    result = score_pope(
        lines(tmp_path / "answers.jsonl", *answers), lines(tmp_path / "questions.jsonl", *rows)
    )
    assert result["accuracy"] == 0.75
    assert result["splits"]["random"]["accuracy"] == 1.0
    assert result["splits"]["popular"]["fp"] == 1


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"answer": "Yes"}], r"has 1 answers, .*questions.json 2 questions"),
        ([{"answer": "Yes"}, {"reply": "No"}], "line 2: no field .*'answer' or .*; found reply"),
        ([{"answer": "Yes"}, {"answer": 0}], "line 2: the field 'answer' is int"),
        (
            [{"answer": "Yes"}, {"question": "Is there a dog in the image?", "answer": "No"}],
            "line 2: answers a question about the object 'dog', but .*line 2 asks about 'apple'",
        ),
        (
            [{"answer": "Yes", "image": "000000000002.jpg"}, {"answer": "No"}],
            "line 1: answers a question about the image '2', but .*questions.json, line 1 asks",
        ),
    ],
)
def test_bad_answers_are_named(tmp_path: Path, answers: list[dict[str, Any]], message: str) -> None:
    asked = lines(tmp_path / "questions.json", *QUESTIONS)
    with pytest.raises(EvalError, match=message):
        score_pope(lines(tmp_path / "answers.jsonl", *answers), asked)


def test_json_output_is_one_object(
    tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = score_chair(lines(tmp_path / "captions.jsonl", *ROWS), truth)
    print_result(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == result


def test_printed_output_shows_value_interval_and_notes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_result(
        {
            "accuracy": 0.5,
            "tp": 3,
            "intervals": {"accuracy": [0.25, 0.75]},
            "flags": ["careful"],
            "splits": {"random": {"accuracy": 1.0, "flags": []}},
        }
    )
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["accuracy", "0.5000", "[0.2500,", "0.7500]"],
        ["tp", "3"],
        ["note:", "careful"],
        ["splits"],
        ["random"],
        ["accuracy", "1.0000"],
    ]


@shared
@pytest.mark.parametrize(
    "name", ["random", "popular", "adversarial", "sentences_llava-1.5_random_first910"]
)
def test_published_pope_answers(tmp_path: Path, name: str) -> None:
    short = name if name.startswith("sentences") else f"llava-v1.5-13b_{name}"
    answers = f"answers_{short}.jsonl"
    expected = json.loads((SHARED / "reference_scores.json").read_text())["pope"][answers]
    questions = SHARED / expected["questions"].split()[0]
    if "first 910" in expected["questions"]:
        first = questions.read_text().splitlines(keepends=True)[:910]
        questions = tmp_path / "questions.json"
        questions.write_text("".join(first))
    result = score_pope(SHARED / "pope" / answers, questions)
    for count in ("TP", "FP", "TN", "FN"):
        assert result[count.lower()] == expected[count]
    for measure in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert result[measure] == pytest.approx(expected[measure], abs=1e-12)
    assert result["unreadable"] == 0.0


@shared
def test_answers_to_another_release_of_the_questions_are_refused() -> None:
    answers = SHARED / "pope" / "answers_llava-v1.5-13b_random.jsonl"
    with pytest.raises(EvalError, match=r"2910 answers, .* 3000 questions"):
        score_pope(answers, SHARED / "pope" / "coco_pope_random.json")


@shared
def test_answers_to_another_split_are_refused() -> None:
    answers = SHARED / "pope" / "answers_llava-v1.5-13b_popular.jsonl"
    with pytest.raises(EvalError, match="line 2: answers a question about the object"):
        score_pope(answers, SHARED / "pope" / "coco_pope_adversarial.json")
