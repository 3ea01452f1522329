"""Scores of answers that lie in files, whoever produced them. Needs no model.

Captions: a JSON list, JSON lines, or `{"imgToEval": {...}}`, with the image under `image_id` (or
`image`, or `question_id`) and the caption under `caption` (or `text`, or `answer`). POPE answers:
official (`question`, `answer`) or LLaVA's (`question_id`, `prompt`, `text`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval import chair, pope
from eval.coco import Vocabulary, image_id, read_truth
from eval.errors import EvalError
from eval.records import Row, read_rows


def score_chair(
    captions: Path, truth: Path, synonyms: Path | None = None, rules: str = "pattern"
) -> dict[str, Any]:
    """CHAIR of a caption file against an objects file or a COCO folder; see `chair.score`.

    `synonyms` is the standard CHAIR list (or a YAML of the shipped form); None is the shipped one.
    """
    vocabulary = Vocabulary.load(synonyms, rules)
    pairs, objects = read_captions(captions, truth, vocabulary)
    return chair.score(pairs, objects, vocabulary)


def read_captions(
    captions: Path, truth: Path, vocabulary: Vocabulary
) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """(image id, caption) pairs of a file, and the true objects of each of their images."""
    rows = read_rows(captions)
    pairs = [(_image(row), row.text("caption", "text", "answer")) for row in rows]
    objects = read_truth(truth, vocabulary, {image for image, _ in pairs})
    for row, (image, _) in zip(rows, pairs, strict=True):
        if image not in objects:
            raise EvalError(
                f"{row.where}: image {image} is not in the truth {truth}. Score against the "
                "annotations of the images that were captioned."
            )
    return pairs, objects


def _image(row: Row) -> int:
    value = row.first("image_id", "image", "question_id")
    try:
        return image_id(value)
    except EvalError as error:
        raise EvalError(f"{row.where}: {error}") from None


def score_pope(answers: Path, questions: Path, parser: str = "official") -> dict[str, Any]:
    """POPE scores of an answer file, paired with the question file by position; see `pope.score`.

    The files must have equally many rows, and where both name the image or the object asked for,
    they must name the same one. Wording is not compared: published files differ in it ("imange", an
    instruction after the question), and ids are numbered anew by some. A question file with several
    splits (`category`) gives `splits` beside the overall scores.
    """
    asked, given = pope.read_questions(questions), read_rows(answers)
    if len(asked) != len(given):
        raise EvalError(
            f"{answers} has {len(given)} answers, {questions} {len(asked)} questions. They are "
            "paired by position, so the counts must agree: use the question file that was asked."
        )
    for question, row in zip(asked, given, strict=True):
        _require_same(question, row)
    texts = [row.text("answer", "text", "ans") for row in given]
    result = _score(asked, texts, parser)
    names = list(dict.fromkeys(question.split for question in asked))
    if len(names) > 1:
        result["splits"] = {name: _score(*_select(asked, texts, name), parser) for name in names}
    return result


def _select(
    questions: list[pope.Question], answers: list[str], split: str
) -> tuple[list[pope.Question], list[str]]:
    kept = [number for number, question in enumerate(questions) if question.split == split]
    return [questions[number] for number in kept], [answers[number] for number in kept]


def _score(questions: list[pope.Question], answers: list[str], parser: str) -> dict[str, Any]:
    labels, images = [q.label for q in questions], [q.image for q in questions]
    return pope.score(answers, labels, images, parser=parser)


def _require_same(question: pope.Question, row: Row) -> None:
    """Refuse an answer that was given to another question."""
    prompts = (row.fields.get(name) for name in ("question", "prompt", "query"))
    prompt = next((text for text in prompts if isinstance(text, str)), "")
    image = Path(str(row.fields.get("image") or "")).stem
    compared = (
        ("object", pope.asked_object(prompt), question.object),
        ("image", image, Path(question.image).stem),
    )
    for name, given, asked in compared:
        # COCO_val2014_000000000009 and 000000000009 are one image
        if given and asked and not (given.endswith(asked) or asked.endswith(given)):
            raise EvalError(
                f"{row.where}: answers a question about the {name} {given!r}, but question "
                f"{question.question_id} asks about {asked!r}. Answers are paired with questions "
                "by position: use the question file that was asked."
            )


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
