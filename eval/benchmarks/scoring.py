"""Scores of answers that lie in files, whoever produced them. Needs no model.

Captions: a JSON list, JSON lines, or `{"imgToEval": {...}}`, with the image under `image_id` (or
`image`, or `question_id`) and the caption under `caption` (or `text`, or `answer`). POPE answers:
official (`question`, `answer`), LLaVA's (`question_id`, `prompt`, `text`), or the logs of lmms-eval
and VLMEvalKit (see `eval.benchmarks.answers`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.benchmarks import chair, echo, pope
from eval.benchmarks.answers import answer_text, label, plain, read_answers
from eval.benchmarks.coco import Vocabulary, image_id, read_truth
from eval.benchmarks.joining import join
from eval.benchmarks.rows import Row, read_rows
from eval.errors import EvalError

CAPTION = ("response", "caption", "text", "answer")


def score_chair(
    captions: Path, truth: Path, synonyms: Path | None = None, rules: str = "pattern"
) -> dict[str, Any]:
    """CHAIR of a caption file against an objects file or a COCO folder; see `chair.score`.

    `synonyms` is the standard CHAIR list (or a YAML of the shipped form); None is the shipped one.
    """
    vocabulary = Vocabulary.load(synonyms, rules)
    pairs, objects, echoes = read_captions(captions, truth, vocabulary)
    found = chair.score(pairs, objects, vocabulary)
    return {**found, "flags": [*found["flags"], *echoes]}


def read_captions(
    captions: Path, truth: Path, vocabulary: Vocabulary
) -> tuple[list[tuple[int, str]], dict[int, list[str]], list[str]]:
    """(image id, caption) pairs of a file, the true objects of each of their images, and the flag
    of captions that hold their prompt."""
    rows = read_answers(captions)
    pairs = [(_image(row), row.text(*CAPTION)) for row in rows]
    prompts = [row.text("prompt") if row.has("prompt") else "" for row in rows]
    objects = read_truth(truth, vocabulary, {image for image, _ in pairs})
    for row, (image, _) in zip(rows, pairs, strict=True):
        if image not in objects:
            raise EvalError(
                f"{row.where}: image {image} is not in the truth {truth}. Score against the "
                "annotations of the images that were captioned."
            )
    texts = [text for _, text in pairs]
    return pairs, objects, echo.flags(list(zip(texts, prompts, strict=True)))


def _image(row: Row) -> int:
    value = row.first("image_id", "image", "question_id")
    try:
        return image_id(value)
    except EvalError as error:
        raise EvalError(f"{row.where}: {error}") from None


def score_pope(
    answers: Path, questions: Path | None = None, parser: str = "official", subset: bool = False
) -> dict[str, Any]:
    """POPE scores of an answer file, joined with the questions as `eval.benchmarks.joining` says.

    Without `questions` the rows must hold their labels, as logs do. `subset` leaves out answers to
    other questions. A question file with several splits (`category`; one question may belong to
    some, with commas between) gives `splits` beside the overall scores, which count each once.
    """
    given = read_answers(answers)
    file, rows = (answers, given) if questions is None else (questions, _question_rows(questions))
    if questions is None and (bare := next((r for r in rows if not r.has("label")), None)):
        raise EvalError(
            f"{bare.where}: no label in it, so the questions are needed: --questions FILE."
        )
    joined = join(rows, given, (file, answers), subset)
    asked = pope.questions_of(rows)
    _require_labels(asked, joined.rows)
    texts = [answer_text(row) for row in joined.rows]
    result = _score(asked, texts, parser)
    names = list(dict.fromkeys(name for question in asked for name in _splits(question)))
    if len(names) > 1:
        result["splits"] = {name: _score(*_select(asked, texts, name), parser) for name in names}
    notes = [] if questions is None else joined.notes
    result["flags"] = [*notes, *result["flags"]]
    return {**result, "joined_by": joined.by if questions else "labels in the answer file"}


def _question_rows(path: Path) -> list[Row]:
    return [plain(row) for row in read_rows(path)]


def _require_labels(questions: list[pope.Question], rows: list[Row]) -> None:
    """Refuse answers that were logged with other labels than those of the questions."""
    labels = [label(row, "label") if row.has("label") else None for row in rows]
    pairs = zip(rows, labels, questions, strict=True)
    other = [(row, question) for row, said, question in pairs if said not in (None, question.label)]
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


def print_result(result: Mapping[str, Any], as_json: bool = False) -> None:
    """One JSON object, or a line per number with its 95 % interval."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print("\n".join(_lines(result)))


def _lines(result: Mapping[str, Any], indent: str = "") -> list[str]:
    intervals = result.get("intervals", {})
    lines = []
    for name, value in result.items():
        if name == "intervals" or value == []:
            continue
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        elif isinstance(value, list):
            lines += [f"{indent}note: {item}" for item in value]
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            low_high = "  [{:.4f}, {:.4f}]".format(*intervals[name]) if name in intervals else ""
            lines.append(f"{indent}{name:<30} {shown}{low_high}")
    return lines
