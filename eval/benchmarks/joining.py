"""Which answer belongs to which question: the rule, the same for every benchmark of questions.

1. By id: the first pair of fields of PAIRS that all rows have, whose values are the same on both
   sides (1 and "1" are the same), each once. `doc_id`, lmms-eval's, is the number of the question's
   row from 0.
2. Else by their content: the image and the question, or the question alone, where that names every
   question. (LLaVA numbers the questions of POPE anew, so its ids mean other questions.)
3. Else, where ids are in common but do not fit, all that are given twice, missing or unknown are
   named in an `EvalError`.
4. Else by position, which `Joined.notes` says.

An answer that names another image or another object than its question never counts as joined.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from eval.benchmarks.rows import Row
from eval.errors import EvalError

IDS = ("doc_id", "question_id", "id", "index")
# the same name on both sides first; the hub's POPE has an `id` beside a `question_id`
PAIRS = (
    *((name, name) for name in IDS),
    *(("question_id", "id"), ("id", "question_id"), ("index", "id"), ("index", "question_id")),
)
RELATED = PAIRS[: len(IDS) + 2]
"""Pairs of which a part in common is enough to say that ids were meant."""
SHOWN = 10
LONGEST_NAME = 1024
QUESTION = ("question", "query", "text", "prompt")
REPEATED = ("question", "query", "prompt")
IMAGES = ("image", "image_source", "image_path", "image_name", "image_id")

_OBJECT = re.compile(r"\bis there an? (.+?) in the im\w*ge\b", re.IGNORECASE)
_Keys: TypeAlias = Sequence[Any]


@dataclass(frozen=True)
class Joined:
    """The answer to each question.

    rows: answers in the order of the questions
    by: what they were joined by
    notes: for whoever reads the score
    """

    rows: list[Row]
    by: str
    notes: list[str]


@dataclass(frozen=True)
class Side:
    """The questions or the answers.

    rows: of their file
    path: of their file, for messages
    names: fields that may hold the question
    """

    rows: Sequence[Row]
    path: Path
    names: tuple[str, ...]

    def ids(self, field: str, numbered: bool = False) -> list[str] | None:
        """The values of an id field as text; None unless every row has one."""
        if field == "doc_id" and numbered and not all(row.has(field) for row in self.rows):
            return [str(number) for number in range(len(self.rows))]
        if not all(row.has(field) for row in self.rows):
            return None
        return [_id(row.first(field)) for row in self.rows]

    def contents(self, *parts: Callable[[Row, Sequence[str]], str]) -> list[tuple[str, ...]] | None:
        """The image and the question, or one of both; None unless every row has them."""
        contents = [tuple(part(row, self.names) for part in parts) for row in self.rows]
        return contents if all(all(parts) for parts in contents) else None


def object_of_question(text: str) -> str:
    """ "snowboard" of "Is there a snowboard in the image?" (or "imange": v1 files), else ""."""
    match = _OBJECT.search(text)
    return match.group(1).lower() if match else ""


def image_name(row: Row) -> str:
    """The image as a row names it, "" where it does not. Pixels (the hub's `image`, VLMEvalKit's
    base64) are no name."""
    values = (row.first(name) for name in IMAGES if row.has(name))
    names = (str(v) for v in values if isinstance(v, (str, int)) and v != "")
    return next((name for name in names if len(name) <= LONGEST_NAME), "")


def image(row: Row, _: Sequence[str] = ()) -> str:
    """The image of a row without folder, suffix and COCO's prefix; "" where it names none."""
    name = Path(image_name(row).replace("\\", "/")).name
    stem = re.sub(r"\.(jpe?g|png|webp|bmp|gif|tiff?|txt)$", "", name, flags=re.IGNORECASE)
    number = re.fullmatch(r"(?:COCO_[a-z]+\d+_)?0*(\d+)", stem)
    return number.group(1) if number else stem


def topic(row: Row, names: Sequence[str]) -> str:
    """The object of the question, else the question in small letters, else ""."""
    text = _first_text(row, names)
    return object_of_question(text) or " ".join(text.lower().split())


def join(
    questions: Sequence[Row], answers: Sequence[Row], files: tuple[Path, Path], subset: bool = False
) -> Joined:
    """The answers in the questions' order, by the rule above; `files` are (questions, answers).

    `subset` leaves out answers to questions that are not among these. `EvalError` says what does
    not fit.
    """
    both = Side(questions, files[0], QUESTION), Side(answers, files[1], REPEATED)
    for by, expected, answered in _candidates(*both):
        rows = _matched(expected, answered, answers, subset)
        if rows is not None and not any(map(differing, questions, rows)):
            left = len(answers) - len(rows)
            notes = [f"{left} answers to other questions are left out"] if left else []
            return Joined(rows, by, notes)
    by_line = _refuse_ids(*both, subset)
    return _by_position(*both, by_line)


def _candidates(questions: Side, answers: Side) -> Iterator[tuple[str, _Keys, _Keys]]:
    """(name, keys of the questions, keys of the answers), the best first."""
    for mine, theirs in PAIRS:
        answered, expected = answers.ids(mine), questions.ids(theirs, numbered=True)
        if answered is not None and expected is not None:
            yield mine, expected, answered
    for by, parts in (("image and question", (image, topic)), ("question", (topic,))):
        contents = questions.contents(*parts), answers.contents(*parts)
        if contents[0] is not None and contents[1] is not None:
            yield by, contents[0], contents[1]


def _matched(
    expected: _Keys, answered: _Keys, answers: Sequence[Row], subset: bool
) -> list[Row] | None:
    """The answer to each expected key, if each has exactly one and there is nothing else."""
    kept = set(expected)
    pairs = [(key, row) for key, row in zip(answered, answers, strict=True) if key in kept]
    by_key = dict(pairs)
    if len(kept) < len(expected) or len(by_key) < len(pairs) or by_key.keys() < kept:
        return None
    return [by_key[key] for key in expected] if subset or len(pairs) == len(answered) else None


def _refuse_ids(questions: Side, answers: Side, subset: bool) -> str | None:
    """EvalError if ids are in common but do not fit.

    Ids that number the questions of each split anew are none; where they agree line by line,
    position is right, and their name is returned.
    """
    for mine, theirs in RELATED:
        answered, expected = answers.ids(mine), questions.ids(theirs, numbered=True)
        if answered is None or expected is None or not set(answered) & set(expected):
            continue
        if len(set(expected)) < len(expected) and answered == expected:
            return mine
        if problems := misfits(expected, answered, subset):
            raise EvalError(
                f"{answers.path}: {mine} does not fit {questions.path}: {problems}. Expected one "
                "answer to every question. Add or drop answers, or give the question file that was "
                "asked" + ("." if subset else "; --subset leaves out answers to other questions.")
            )
        by_id = dict(zip(answered, answers.rows, strict=True))
        _require_alike(questions.rows, [by_id[key] for key in expected])
    return None


def misfits(expected: Sequence[str], answered: Sequence[str], subset: bool = False) -> str:
    """All ids that are wrong, in words: given twice, without an answer, unknown; "" if none is."""
    times = Counter(answered)
    known = set(expected)
    kinds = {
        "given more than once": [key for key, n in times.items() if n > 1 and key in known],
        "without an answer": [key for key in dict.fromkeys(expected) if key not in times],
        "not among the questions": [] if subset else [key for key in times if key not in known],
        "more than once among the questions": [k for k, n in Counter(expected).items() if n > 1],
    }
    return "; ".join(f"{kind}: {capped(keys)}" for kind, keys in kinds.items() if keys)


def capped(names: Collection[str]) -> str:
    """The names, or the first of them and how many there are."""
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names)} in all)"


def _by_position(questions: Side, answers: Side, ids: str | None) -> Joined:
    if len(questions.rows) != len(answers.rows):
        raise EvalError(
            f"{answers.path} has {len(answers.rows)} answers, {questions.path} "
            f"{len(questions.rows)} questions, and no ids in common. They would be joined by "
            "position, so the counts must agree: use the question file that was asked."
        )
    _require_alike(questions.rows, answers.rows)
    why = f"{ids} repeats among the questions" if ids else "the files have no ids in common"
    return Joined(list(answers.rows), "position", [f"joined by position, line by line: {why}"])


def _require_alike(questions: Sequence[Row], answers: Sequence[Row]) -> None:
    for question, row in zip(questions, answers, strict=True):
        if (difference := differing(question, row)) is not None:
            name, answered, expected = difference
            raise EvalError(
                f"{row.where}: answers a question about the {name} {answered!r}, but "
                f"{question.where} asks about {expected!r}: use the question file that was asked."
            )


def differing(question: Row, answer: Row) -> tuple[str, str, str] | None:
    """(what, the answer's, the question's) where the two name another object or image.

    Wording is not compared: published files differ in it ("imange", an instruction after the
    question).
    """
    topics = topic(answer, REPEATED), topic(question, QUESTION)
    texts = [_first_text(row, names) for row, names in ((answer, REPEATED), (question, QUESTION))]
    if all(topics) and all(map(object_of_question, texts)) and topics[0] != topics[1]:
        return "object", *topics
    images = image(answer), image(question)
    same = images[0] == images[1] or (
        not all(map(str.isdecimal, images))
        and (images[0].endswith(images[1]) or images[1].endswith(images[0]))
    )
    return None if same or not all(images) else ("image", *images)


def _first_text(row: Row, names: Sequence[str]) -> str:
    values = (row.first(name) for name in names if row.has(name))
    return next((value for value in values if isinstance(value, str)), "")


def _id(value: Any) -> str:
    """1, 1.0 (from a table) and "1" are one id."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()
