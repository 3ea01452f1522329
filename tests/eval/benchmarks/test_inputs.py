"""Answer files as people have them: docs/inputs.md is the table of these tests."""

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from eval.__main__ import main
from eval.benchmarks import chair, echo, mme, mmhal
from eval.benchmarks.amber import files as amber_files
from eval.benchmarks.chair.files import score_files as score_chair
from eval.benchmarks.coco import Vocabulary
from eval.benchmarks.hallusionbench import files as hallusionbench_files
from eval.benchmarks.pope.files import score_files as score_pope
from eval.errors import EvalError

A, B = "COCO_val2014_000000000139.jpg", "COCO_val2014_000000000285.jpg"
QUESTIONS = [
    {"question_id": 1, "image": A, "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": A, "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": B, "text": "Is there a tv in the image?", "label": "yes"},
    {"question_id": 4, "image": B, "text": "Is there a bear in the image?", "label": "yes"},
]
RIGHT = {1: "Yes", 2: "No", 3: "Yes", 4: "Yes"}
"""Three of the four labels are yes, so that no wrong order scores 1."""
Score = Callable[..., dict[str, Any]]


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def given(order: str = "4321") -> list[dict[str, Any]]:
    """Right answers by id, in this order."""
    return [{"question_id": int(n), "text": RIGHT[int(n)]} for n in order]


@pytest.fixture
def score(tmp_path: Path) -> Score:
    """POPE of an answer file with this content, against QUESTIONS or others."""

    def scored(
        answers: str | bytes,
        name: str = "answers.jsonl",
        questions: str | None = jsonl(*QUESTIONS),
        **options: Any,
    ) -> dict[str, Any]:
        path = tmp_path / name
        path.write_bytes(answers if isinstance(answers, bytes) else answers.encode())
        if questions is None:
            return score_pope(path, **options)
        (tmp_path / "questions.jsonl").write_text(questions)
        return score_pope(path, tmp_path / "questions.jsonl", **options)

    return scored


@pytest.mark.parametrize("write", [int, str, float, lambda n: f" {n} "])
def test_ids_as_numbers_or_text(score: Score, write: Callable[[int], Any]) -> None:
    rows = [row | {"question_id": write(row["question_id"])} for row in given()]
    found = score(jsonl(*rows))
    assert (found["accuracy"], found["joined_by"], found["flags"]) == (1.0, "question_id", [])


def test_every_wrong_id_is_named(score: Score) -> None:
    message = r"question_id .*given more than once: 2; without an answer: 3; not among .*: 9\."
    with pytest.raises(EvalError, match=message):
        score(jsonl(*given("1224"), {"question_id": 9, "text": "No"}))
    many = [{"question_id": n, "text": "No"} for n in range(1, 40)]
    with pytest.raises(EvalError, match=r"not among the questions: 5, .*14, \.\.\. \(35 in all\)"):
        score(jsonl(*many))


def test_answers_to_other_questions_are_left_out_where_asked(score: Score) -> None:
    rows = jsonl(*given(), {"question_id": 9, "text": "No"})
    with pytest.raises(EvalError, match=r"not among the questions: 9\..*--subset"):
        score(rows)
    found = score(rows, subset=True)
    assert (found["accuracy"], found["n"]) == (1.0, 4)
    assert found["flags"] == ["1 answers to other questions are left out"]
    with pytest.raises(EvalError, match=r"without an answer: 4\."):
        score(jsonl(*given("123"), {"question_id": 9, "text": "No"}), subset=True)


def test_position_is_said(score: Score) -> None:
    found = score(jsonl(*({"text": RIGHT[n]} for n in (1, 2, 3, 4))))
    assert (found["accuracy"], found["joined_by"]) == (1.0, "position")
    why = "joined by position, line by line: the files have no ids in common"
    assert found["flags"] == [why]


@pytest.mark.parametrize(
    "image", [A, A.removesuffix(".jpg"), "000000000139.jpg", rf"D:\coco\val2014\{A}", 139]
)
def test_running_numbers_are_joined_by_image_and_question(score: Score, image: Any) -> None:
    """LLaVA's ids, and images as everybody writes them; two questions have one wording."""
    same = [QUESTIONS[0] | {"question_id": 5, "image": B, "label": "no"}, *QUESTIONS[:2]]
    names = {A: image, B: B}
    rows = [
        {
            "question_id": 700 + n,
            "image": names[str(q["image"])],
            "prompt": f"{q['text']}\nOne word.",
        }
        | {"text": str(q["label"])}
        for n, q in enumerate(same)
    ]
    found = score(jsonl(*rows), questions=jsonl(*same[::-1]))
    assert (found["accuracy"], found["joined_by"]) == (1.0, "image and question")


def test_one_wording_for_two_images_needs_ids(score: Score) -> None:
    same = [QUESTIONS[0], QUESTIONS[0] | {"question_id": 2, "image": B, "label": "no"}]
    rows = [
        {"question_id": q["question_id"], "question": q["text"], "text": q["label"]} for q in same
    ]
    found = score(jsonl(*rows[::-1]), questions=jsonl(*same))
    assert (found["accuracy"], found["joined_by"]) == (1.0, "question_id")


def test_ids_that_mean_other_questions_are_refused(score: Score) -> None:
    rows = [
        {"question_id": n, "question": f"Is there a {thing} in the image?", "text": "Yes"}
        for n, thing in ((1, "dog"), (2, "cow"), (3, "tv"), (4, "bear"))
    ]
    with pytest.raises(EvalError, match=r"line 2: answers .* object 'cow', .* asks about 'cat'"):
        score(jsonl(*rows))


def test_a_question_that_stands_twice(score: Score) -> None:
    twice = jsonl(*QUESTIONS[:2], QUESTIONS[0] | {"question_id": 3})
    rows = given("123")
    assert score(jsonl(*rows[::-1]), questions=twice)["joined_by"] == "question_id"
    repeated = jsonl(*QUESTIONS[:2], QUESTIONS[1])
    with pytest.raises(EvalError, match="more than once among the questions: 2"):
        score(jsonl(*given("12"), {"question_id": 3, "text": "No"}), questions=repeated)


HUB = [
    {"id": str(n), "question_id": str(n + 1), "question": q["text"], "answer": q["label"]}
    | {"image_source": str(q["image"]).removesuffix(".jpg"), "category": "adversarial"}
    for n, q in enumerate(QUESTIONS)
]


@pytest.mark.parametrize("content", [jsonl(*HUB), json.dumps(HUB)])
def test_the_hubs_questions(score: Score, content: str) -> None:
    found = score(jsonl(*given()), questions=content)
    assert (found["accuracy"], found["tp"], found["tn"]) == (1.0, 3, 1)


def logged(n: int, **more: Any) -> dict[str, Any]:
    """A row of lmms-eval's log of question n, as it is in memory."""
    doc = {"question_id": str(n - 1), "question": QUESTIONS[n - 1]["text"]}
    answer = {"doc": {**doc, "answer": QUESTIONS[n - 1]["label"]}, "target": RIGHT[n].lower()}
    said = {"resps": [[RIGHT[n]]], "filtered_resps": [RIGHT[n]]}
    return {"doc_id": n - 1, **answer, **said, **more}


@pytest.mark.parametrize("questions", [jsonl(*QUESTIONS), jsonl(*HUB), None])
def test_a_log_of_lmms_eval(score: Score, questions: str | None) -> None:
    """Of several processes, one after the other: rows in any order."""
    rows = [logged(n) for n in (2, 4, 1, 3)]
    assert score(jsonl(*rows), questions=questions)["accuracy"] == 1.0
    wrong = [logged(1, filtered_resps=["No"]), *rows[:2], rows[3]]
    assert score(jsonl(*wrong), questions=questions)["accuracy"] == 0.75


def test_a_log_of_lmms_eval_as_it_is_saved(score: Score) -> None:
    """Without `doc`, lists of one taken off, and `resps` only where it differs."""
    rows = [
        {"doc_id": n - 1, "target": RIGHT[n].lower(), "filtered_resps": RIGHT[n], "doc_hash": "x"}
        | {"input": f"{QUESTIONS[n - 1]['text']}\nAnswer the question using a single word."}
        | {"pope_accuracy": {"question_id": str(n), "score": 1.0, "prediction": "yes"}}
        for n in (3, 1, 2, 4)
    ]
    found = score(jsonl(*rows))
    assert (found["accuracy"], found["joined_by"]) == (1.0, "doc_id")
    with pytest.raises(EvalError, match=r"doc_id does not fit .*without an answer: 1, 3"):
        score(jsonl(*rows[:2]))


def test_several_responses_are_refused(score: Score) -> None:
    with pytest.raises(EvalError, match=r"line 1: the field 'filtered_resps' is .*one response"):
        score(jsonl(logged(1, filtered_resps=["Yes", "No"])))


def test_a_log_with_other_labels_is_refused(score: Score) -> None:
    rows = [logged(n, target="no") for n in (1, 2, 3, 4)]
    with pytest.raises(EvalError, match=r"line 1: .*another label than 'yes'.* \(3 such rows\)"):
        score(jsonl(*rows))


KIT = [
    {"index": n, "question": QUESTIONS[n]["text"], "answer": str(QUESTIONS[n]["label"]).title()}
    | {"category": "popular" if n else "popular,random", "prediction": "Yes"}
    for n in range(4)
]
COLUMNS = [*KIT[0]]


def table(separator: str) -> str:
    lines = [COLUMNS, *(row.values() for row in KIT)]
    return "\r\n".join(separator.join(f'"{cell}"' for cell in line) for line in lines)


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.tsv", table("\t")), ("p.csv", table(",")), ("p.json", json.dumps(KIT, indent=4))],
)
def test_predictions_of_vlmevalkit(score: Score, name: str, content: str) -> None:
    """`answer` is the label there: read as the answer it would score 1."""
    found = score(content, name, questions=None)
    assert (found["accuracy"], found["n"]) == (0.75, 4)
    assert found["splits"]["popular"]["n"] == 4
    assert found["splits"]["random"] | {"n": 1, "tp": 1} == found["splits"]["random"]
    assert found["joined_by"] == "labels in the answer file"


def test_an_xlsx_file(score: Score, tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for line in [COLUMNS, *(list(row.values()) for row in KIT)]:
        book.active.append(line)
    book.save(tmp_path / "p.xlsx")
    assert score_pope(tmp_path / "p.xlsx")["accuracy"] == 0.75
    (tmp_path / "no.xlsx").write_text("no zip")
    with pytest.raises(EvalError, match=r"no\.xlsx: cannot be read as an XLSX file"):
        score_pope(tmp_path / "no.xlsx")


def test_an_xlsx_file_without_the_extra(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(EvalError, match=r'needs openpyxl: pip install -e "\.\[xlsx\]"'):
        score("", "p.xlsx")


@pytest.mark.parametrize("name", ["p.parquet", "p.pkl"])
def test_forms_that_are_not_read_say_what_to_do(score: Score, name: str) -> None:
    with pytest.raises(EvalError, match=r"files are not read; (convert it|a pickle can run code)"):
        score(b"\x80PAR1", name)


def test_a_cell_with_a_whole_image(score: Score) -> None:
    """VLMEvalKit's question files hold pixels: the cell is longer than csv reads by default."""
    rows = [{**row, "image": "/9j/4AAQ" * 40_000} for row in KIT]
    lines = [[*rows[0]], *(map(str, row.values()) for row in rows)]
    content = "\n".join("\t".join(line) for line in lines)
    assert score(content, "p.tsv", questions=None)["accuracy"] == 0.75
    with pytest.raises(EvalError, match=r"p\.tsv, row 1: 5 cells under 6 columns"):
        score(content.replace("\tYes\t/9j", "\t/9j", 1), "p.tsv", questions=None)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(jsonl(*given()).encode()),
        jsonl(*given()).encode("utf-16"),
        b"\xef\xbb\xbf" + jsonl(*given()).replace("\n", "\r\n").encode() + b"\r\n\r\n",
        json.dumps(given(), indent=1).encode(),
        jsonl(*(row | {"note": "x" * 3_000_000} for row in given())).encode(),
    ],
    ids=["gzip", "UTF-16 of a Windows shell", "BOM, CRLF, blank lines", "a list", "long lines"],
)
def test_encodings(score: Score, content: bytes) -> None:
    assert score(content)["accuracy"] == 1.0


def test_a_broken_gzip_is_named(score: Score) -> None:
    with pytest.raises(EvalError, match=r"answers\.jsonl: cannot be read"):
        score(gzip.compress(jsonl(*given()).encode())[:-12])


@pytest.mark.parametrize(
    "labels", [(1, 0), (True, False), ("Yes", "No "), ("YES", "NO"), ("1", "0"), (1.0, 0.0)]
)
def test_labels(score: Score, labels: tuple[Any, Any]) -> None:
    asked = [q | {"label": labels[q["label"] == "no"]} for q in QUESTIONS]
    assert score(jsonl(*given()), questions=jsonl(*asked))["accuracy"] == 1.0


def test_fields_in_other_letters(score: Score) -> None:
    rows = [{"Question_ID": row["question_id"], "Answer": row["text"]} for row in given()]
    found = score(jsonl(*rows))
    assert (found["accuracy"], found["joined_by"]) == (1.0, "question_id")


def test_the_label_beside_the_answer_is_not_the_answer(score: Score) -> None:
    rows = [{"question_id": n, "answer": RIGHT[n], "response": "No"} for n in RIGHT]
    assert score(jsonl(*rows))["accuracy"] == 0.25


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_an_answer_that_is_missing_is_refused(score: Score, value: str) -> None:
    rows = jsonl(*given("123")) + f'{{"question_id": 4, "text": {value}}}\n'
    with pytest.raises(EvalError, match=r'line 4: the field \'text\' is .*is empty is written ""'):
        score(rows)


@pytest.mark.parametrize(
    ("answer", "strict", "other", "unreadable"),
    [
        ("NO", "no", 1, 0.0),
        ("**No**", "no", 1, 0.0),
        ("\nNo", "no", 1, 0.0),
        ("no!", "no", 1, 0.0),
        ("No", "no", 0, 0.0),
        ("**Yes**", "yes", 0, 0.0),
        ("yes.", "yes", 0, 0.0),
        ("", None, 0, 1.0),
        ("Oui", None, 0, 1.0),
        ("不是", None, 0, 1.0),
    ],
)
def test_answers_that_the_official_parser_misreads(
    score: Score, answer: str, strict: str | None, other: int, unreadable: float
) -> None:
    asked = jsonl(QUESTIONS[1])
    row = jsonl({"question_id": 2, "text": answer})
    found = score(row, questions=asked)
    assert (found["read_otherwise"], found["unreadable"]) == (other, unreadable)
    flag = "1 of 1 answers are read otherwise by the strict parser than by official"
    assert (flag in found["flags"]) is bool(other)
    assert found["accuracy"] == (answer == "No")  # the official value stays
    read = score(row, questions=asked, parser="strict")
    assert (read["accuracy"], read["read_otherwise"]) == (strict == "no", 0)


PAIR = [
    {"index": 0, "category": "existence", "image_path": "a.jpg", "question": "Is it?"}
    | {"answer": "Yes", "prediction": "Yes."},
    {"index": 1, "category": "existence", "image_path": "a.jpg", "question": "Is it not?"}
    | {"answer": "No", "prediction": "I think that it is not"},
]
SAVED = [
    {"doc_id": n, "target": label, "filtered_resps": said, "input": "Is it?"}
    | {"mme_perception_score": {"question_id": "existence/a.png", "category": "existence"}}
    for n, (label, said) in enumerate((("Yes", "Yes."), ("No", "I think not")))
]


@pytest.mark.parametrize("rows", [PAIR, SAVED])
def test_logs_of_mme(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "mme.json"
    path.write_text(json.dumps(rows))
    part = mme.score_files(path)["subtasks"]["existence"]
    assert (part["score"], part["unreadable"]) == (50.0, 0.5)
    assert part["flags"] == ["1 of 2 answers are neither yes nor no to the official parser"]
    path.write_text(json.dumps(rows[:1]))
    with pytest.raises(EvalError, match=r"two answers an image; found .*a\.\w+ \(1\)"):
        mme.score_files(path)


def test_the_parser_of_mme_is_chosen_by_name(tmp_path: Path) -> None:
    """The official one looks at four characters: " [Yes" is none, and "Note" is a no."""
    lines = ["a.jpg\tIs it?\tYes\tThe answer is yes", "a.jpg\tIs it?\tNo\tNote that it is: yes"]
    (tmp_path / "count.txt").write_text("\n".join(lines))
    found = [mme.score_files(tmp_path, name) for name in ("official", "strict")]
    assert [part["subtasks"]["count"]["accuracy"] for part in found] == [0.5, 0.5]
    flags = found[0]["subtasks"]["count"]["flags"]
    assert flags == [
        "1 of 2 answers are neither yes nor no to the official parser",
        "2 of 2 answers are read otherwise by the strict parser than by official",
    ]
    assert (found[1]["parser"], found[1]["subtasks"]["count"]["flags"]) == ("strict", [])
    with pytest.raises(EvalError, match="parser 'mine': expected one of official, strict"):
        mme.score_files(tmp_path, "mine")


FIGURE = {
    **{"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": "1"},
    **{"question_id": "2", "visual_input": "1", "question": "Is it?"},
    **{"gt_answer_details": "It is.", "gt_answer": "1"},
}


def test_hallusionbench_of_vlmevalkit(tmp_path: Path) -> None:
    """Its index ends in set, figure and question; `answer` is the label."""
    answers, questions = tmp_path / "a.tsv", tmp_path / "q.json"
    questions.write_text(json.dumps([FIGURE]))
    row = "VD_chart_1_0_1_2\tIs it?\tYes\tVD\tchart\tPerhaps"
    head = "index\tquestion\tanswer\tcategory\tl2-category\tprediction"
    answers.write_text(f"{head}\n{row}\n")
    found = hallusionbench_files.score_files(answers, questions)
    assert (found["a_acc"], found["answered"]) == (0.0, 1)
    assert found["flags"][0] == "1 of 1 answers are neither yes nor no to the strict parser"
    answers.write_text(f"{head}\n{row}\n{row}\n")
    with pytest.raises(EvalError, match="question VD/chart/0/1/2 is answered more than once"):
        hallusionbench_files.score_files(answers, questions)


@pytest.fixture
def amber_data(tmp_path: Path) -> Path:
    items = [{"id": n, "type": "relation", "truth": "no"} for n in range(1, 5)]
    items.append({"id": 5, "type": "generative", "truth": ["dog"], "hallu": ["cat"]})
    (tmp_path / "annotations.json").write_text(json.dumps(items))
    queries = [{"id": n, "image": "a.jpg", "query": "Is it?"} for n in range(1, 5)]
    queries.append({"id": 5, "image": "a.jpg", "query": "Describe this image."})
    (tmp_path / "query_all.json").write_text(json.dumps(queries))
    (tmp_path / "relation.json").write_text('{"dog": [], "cat": []}')
    (tmp_path / "safe_words.txt").write_text("line")
    return tmp_path


def amber_scored(data: Path, said: list[tuple[Any, str]], **options: Any) -> dict[str, Any]:
    path = data / "r.json"
    path.write_text(json.dumps([{"id": n, "response": text} for n, text in said]))
    return amber_files.score_files(path, data, "approximate", **options)


def test_the_parser_of_amber_is_chosen_by_name(amber_data: Path) -> None:
    said = [(1, "No"), (2, "No, there is none."), (3, "no"), (4, "Perhaps")]
    official, strict = (
        amber_scored(amber_data, said, parser=name)["discriminative"]["all"]
        for name in ("official", "strict")
    )
    assert (official["accuracy"], official["unreadable"]) == (0.25, 0.75)
    assert official["flags"] == [
        "3 of 4 answers are neither yes nor no to the official parser",
        "2 of 4 answers are read otherwise by the strict parser than by official",
    ]
    assert (strict["accuracy"], strict["unreadable"], strict["parser"]) == (0.75, 0.25, "strict")


def test_ids_of_amber(amber_data: Path) -> None:
    found = amber_scored(amber_data, [("1", "No"), (3, "No")])
    assert found["flags"] == ["2 of 4 questions have no response: id 2, 4"]
    with pytest.raises(EvalError, match=r"id 1, 2 has more than one response"):
        amber_scored(amber_data, [(1, "No"), (2, "No"), (1, "No"), (2, "No")])
    with pytest.raises(EvalError, match=r"r\.json, entry 2: id 8, 9 is not in"):
        amber_scored(amber_data, [(1, "No"), (8, "No"), (9, "No")])


def test_a_description_that_holds_its_prompt(amber_data: Path) -> None:
    found = amber_scored(amber_data, [(5, "Describe this image. A dog.")])
    (flag,) = found["generative"]["flags"]
    assert flag.startswith("1 of 1 captions hold their own prompt")


@pytest.mark.parametrize(
    ("text", "prompt", "holds"),
    [
        ("USER: \nPlease describe this image in detail. ASSISTANT: A dog.", "", True),
        ("Please describe this image in detail. A dog.", "", True),
        ("please  describe this image\nin detail A dog.", "", True),
        ("What do you see? A dog.", "What do you see?", True),
        ("ASSISTANT: A dog.", "", True),
        ("<|im_start|>assistant\nA dog.", "", True),
        ("[INST] Describe. [/INST] A dog.", "", True),
        ("<image>\nA dog.", "", True),
        ("What do you see? A dog.", "", False),
        ("A dog sits beside a computer user: its owner.", "", False),
        ("A dog.", "Please describe this image in detail.", False),
    ],
)
def test_captions_that_hold_their_prompt(
    tmp_path: Path, text: str, prompt: str, holds: bool
) -> None:
    assert echo.holds_prompt(text, prompt) is holds
    (tmp_path / "truth.json").write_text('{"1": ["dog"], "2": ["dog"]}')
    rows = [{"image_id": 1, "caption": text}, {"image_id": 2, "caption": "A dog."}]
    (tmp_path / "c.jsonl").write_text(jsonl(*(row | {"prompt": prompt} for row in rows)))
    found = score_chair(tmp_path / "c.jsonl", tmp_path / "truth.json")
    flagged = [flag for flag in found["flags"] if flag.startswith("1 of 2 captions hold their own")]
    assert len(flagged) == holds
    plain = chair.score([(1, text), (2, "A dog.")], {1: ["dog"], 2: ["dog"]}, Vocabulary.load())
    assert found["chair_i"] == plain["chair_i"]  # said, not changed


def test_mmhal_answers_in_any_order(tmp_path: Path) -> None:
    rows = [
        {"question_type": "other", "image_id": name, "question": "What is it?", "model_answer": ""}
        for name in ("a1", "b2")
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    said = [row | {"model_answer": f"It is {row['image_id']}."} for row in rows[::-1]]
    (tmp_path / "a.json").write_text(json.dumps(said))
    mmhal.score_files(tmp_path / "a.json", tmp_path / "q.json", export=tmp_path / "out.json")
    out = json.loads((tmp_path / "out.json").read_text())
    assert [row["model_answer"] for row in out] == ["It is a1.", "It is b2."]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers, questions = tmp_path / "a.jsonl", tmp_path / "q.jsonl"
    answers.write_text(jsonl(*given(), {"question_id": 9, "text": "No"}))
    questions.write_text(jsonl(*QUESTIONS))
    command = ["score", "pope", "--answers", str(answers), "--questions", str(questions)]
    assert main(command) == 1
    assert "not among the questions: 9" in capsys.readouterr().err
    assert main([*command, "--subset"]) == 0
    assert re.search(r"joined_by +question_id", shown := capsys.readouterr().out)
    assert "note: 1 answers to other questions are left out" in shown
    assert main(["score", "pope", "--answers", str(answers)]) == 1
    assert "no label in it, so the questions are needed" in capsys.readouterr().err


def test_the_table_names_these_tests() -> None:
    page = (Path(__file__).parents[3] / "docs" / "inputs.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    here = {name for name in globals() if name.startswith("test_")}
    assert named == here - {"test_the_table_names_these_tests"}
