"""POPE from files: answers made elsewhere, and questions made of annotations. Needs no model.

Answers are official (`question`, `answer`), LLaVA's (`question_id`, `prompt`, `text`), or the logs
of lmms-eval and VLMEvalKit (see `eval.benchmarks.answers`).
"""

import json
from pathlib import Path
from typing import Any

from eval.benchmarks import pope
from eval.benchmarks.answers import answer_text, label, plain, read_answers
from eval.benchmarks.coco import Vocabulary, named_truth
from eval.benchmarks.joining import join
from eval.benchmarks.parsers import ParserName
from eval.benchmarks.rows import Row, read_rows
from eval.errors import EvalError


def score_files(
    answers: Path,
    questions: Path | None = None,
    parser: ParserName = "official",
    subset: bool = False,
) -> dict[str, Any]:
    """Yes/no answers made elsewhere, against POPE questions.

    Answers and questions are joined as `eval.benchmarks.joining` says. A question file with several
    splits (`category`; one question may belong to some, with commas between) gives `splits` beside
    the overall scores, which count each once.

    answers: JSON, JSON lines, TSV or XLSX; a log of lmms-eval or VLMEvalKit
    questions: official, LLaVA's or the hub's (not needed where a log holds the labels)
    parser: how an answer is read
    subset: leave out answers to questions that are not in the file
    """
    given = read_answers(answers)
    file, rows = (answers, given) if questions is None else (questions, _question_rows(questions))
    if questions is None and (bare := next((r for r in rows if not r.has("label")), None)):
        raise EvalError(
            f"{bare.where}: no label in it, so the questions are needed: --questions FILE."
        )
    joined = join(rows, given, (file, answers), subset)
    parsed = pope.questions_of(rows)
    _require_labels(parsed, joined.rows)
    texts = [answer_text(row) for row in joined.rows]
    result = _score(parsed, texts, parser)
    names = list(dict.fromkeys(name for question in parsed for name in _splits(question)))
    if len(names) > 1:
        result["splits"] = {name: _score(*_select(parsed, texts, name), parser) for name in names}
    notes = [] if questions is None else joined.notes
    result["flags"] = [*notes, *result["flags"]]
    return {**result, "joined_by": joined.by if questions else "labels in the answer file"}


def _question_rows(path: Path) -> list[Row]:
    return [plain(row) for row in read_rows(path)]


def _require_labels(questions: list[pope.Question], rows: list[Row]) -> None:
    """Refuse answers that were logged with other labels than those of the questions."""
    labels = [label(row, "label") if row.has("label") else None for row in rows]
    pairs = zip(rows, labels, questions, strict=True)
    other = [
        (row, question) for row, logged, question in pairs if logged not in (None, question.label)
    ]
    if other:
        row, question = other[0]
        raise EvalError(
            f"{row.where}: the answer is logged with another label than {question.label!r}, that "
            f"of question {question.question_id} ({len(other)} such rows): use the question file "
            "that was asked."
        )


def _splits(question: pope.Question) -> list[str]:
    return question.split.split(",")


def _select(
    questions: list[pope.Question], answers: list[str], split: str
) -> tuple[list[pope.Question], list[str]]:
    kept = [number for number, question in enumerate(questions) if split in _splits(question)]
    return [questions[number] for number in kept], [answers[number] for number in kept]


def _score(questions: list[pope.Question], answers: list[str], parser: str) -> dict[str, Any]:
    labels, images = [q.label for q in questions], [q.image for q in questions]
    return pope.score(answers, labels, images if all(images) else None, parser=parser)


def write_questions(
    truth: Path,
    to: Path,
    images: int = 500,
    per_image: int = 3,
    seed: int = 0,
    synonyms: Path | None = None,
) -> None:
    """POPE questions of any COCO-format annotation.

    truth (OBJECTS.json|COCO_DIR): objects file or COCO folder
    to (DIR): where they go
    images: drawn of those with enough objects
    per_image: yes questions an image
    seed: of the draw
    synonyms: object vocabulary (default: what ships)
    """
    objects = named_truth(truth, Vocabulary.load(synonyms))
    to.mkdir(parents=True, exist_ok=True)
    for strategy in pope.STRATEGIES:
        path = to / f"coco_pope_{strategy}.json"
        made = pope.build_questions(objects, strategy, images, per_image, seed)
        rows = (
            {"question_id": q.question_id, "image": q.image, "text": q.text, "label": q.label}
            for q in made
        )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(made)} questions on {images} images")
