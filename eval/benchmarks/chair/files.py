"""CHAIR of captions that lie in a file, whoever wrote them. Needs no model."""

from pathlib import Path
from typing import Any

from eval.benchmarks import echo
from eval.benchmarks.answers import read_answers
from eval.benchmarks.chair import score
from eval.benchmarks.coco import Rules, Vocabulary, image_id, read_truth
from eval.benchmarks.rows import Row
from eval.errors import EvalError

CAPTION = ("response", "caption", "text", "answer")


def score_files(
    captions: Path, truth: Path, synonyms: Path | None = None, rules: Rules = "pattern"
) -> dict[str, Any]:
    """Captions made elsewhere, against COCO objects.

    A caption file is a JSON list, JSON lines, or `{"imgToEval": {...}}`, with the image under
    `image_id` (or `image`, or `question_id`) and the caption under `caption` (or `text`, or
    `answer`). Synonyms are the standard CHAIR list, or a YAML of the shipped form.

    captions: JSON list or JSON lines
    truth (OBJECTS.json|COCO_DIR): objects file or COCO folder
    synonyms: object vocabulary (default: the one that ships)
    rules: how captions, and the captions behind a truth, are read
    """
    vocabulary = Vocabulary.load(synonyms, rules)
    pairs, objects, echoes = read_captions(captions, truth, vocabulary)
    scores = score(pairs, objects, vocabulary)
    return {**scores, "flags": [*scores["flags"], *echoes]}


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
