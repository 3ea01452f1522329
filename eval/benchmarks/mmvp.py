"""MMVP: questions with two options on 150 pairs of images that CLIP cannot tell apart.

Tong et al. 2024, https://arxiv.org/abs/2401.06209. One row of `Questions.csv`:
`1,"Are the butterfly's wings closer to being open or closed?",(a) Open (b) Closed,(a)`.
One answer: `{"question_id": 1, "response": "(a) Open"}`. Rows 2k - 1 and 2k are a pair.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np

from eval.benchmarks.answers import answer_text, read_answers
from eval.benchmarks.base import (
    ALL,
    Benchmark,
    FolderSettings,
    Measure,
    Rows,
    Sample,
    Source,
    pairs,
)
from eval.benchmarks.intervals import Numbers, Tally
from eval.benchmarks.joining import join
from eval.benchmarks.judge import NO_JUDGE, Template, TemplateOptions
from eval.benchmarks.parsers import first_word
from eval.benchmarks.rows import Row, read_text
from eval.errors import EvalError

COLUMNS = ("Index", "Question", "Options", "Correct Answer")
Labels: TypeAlias = Literal["published", "corrected"]
LABELS = get_args(Labels)
SWAPPED = (99, 100, 279, 280)
"""Questions of two pairs whose labels are the wrong way round; lmms-eval corrects them."""


@dataclass(frozen=True)
class Question:
    """One question.

    index: its number from 1; two that follow each other are a pair
    text: the question
    options: the texts behind (a) and (b)
    label: "a" or "b"
    """

    index: int
    text: str
    options: Mapping[str, str]
    label: str


def chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer chooses: its only letter in brackets, else a letter or an option
    that it starts with, else the only option that it names; None where that does not tell."""
    lowered = answer.lower()
    if bracketed := sorted(set(re.findall(r"\(([ab])\)", lowered))):
        return str(bracketed[0]) if len(bracketed) == 1 else None
    if start := re.match(r"\W*(?:answer\W+)?([ab])(?:[.:)\s]*$|[.:)])", lowered):
        return start.group(1)
    named = [letter for letter, text in options.items() if re.search(_whole(text), lowered)]
    return named[0] if len(named) == 1 else None


def _whole(text: str) -> str:
    return rf"(?<!\w){re.escape(text.lower())}(?!\w)"


def score(right: Sequence[bool | None], seed: int = 0) -> dict[str, Any]:
    """Pair accuracy and accuracy of judged answers in order, with 95 % intervals over pairs.

    None is an answer that could not be read: wrong, and counted in `unreadable`.
    """
    return tally(right).report(seed)


def tally(right: Sequence[bool | None]) -> Tally:
    """What each pair adds."""
    if not right or len(right) % 2:
        raise EvalError(f"MMVP: {len(right)} answers; expected pairs.")
    marks = np.array([bool(mark) for mark in right]).reshape(-1, 2)
    unread = np.array([mark is None for mark in right]).reshape(-1, 2)
    columns = {
        "pairs": np.ones(len(marks)),
        "pairs_right": marks.all(axis=1),
        "questions": np.full(len(marks), 2),
        "right": marks.sum(axis=1),
        "unreadable": unread.sum(axis=1),
    }
    return Tally(columns, _ratios, marks.ravel())


def _ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    return {
        "pair_accuracy": (c["pairs_right"], c["pairs"]),
        "accuracy": (c["right"], c["questions"]),
        "unreadable": (c["unreadable"], c["questions"]),
    }


def score_files(
    answers: Path,
    questions: Path,
    judging: TemplateOptions = NO_JUDGE,
    labels: Labels = "published",
    subset: bool = False,
) -> dict[str, Any]:
    """MMVP answers in pairs, by the option that they name or a judge.

    The published script asks a judge; `variant` in the scores says what was done.

    answers: rows with question_id and response
    questions: Questions.csv
    labels: as published, or four of them corrected
    subset: leave out answers to questions that are not in the file
    """
    known = read_questions(questions, labels)
    joined = join(_rows(known, questions), read_answers(answers), (questions, answers), subset)
    texts = [answer_text(row) for row in joined.rows]
    judge = judging.open()
    notes = {"joined_by": joined.by, "flags": joined.notes}
    if judge is None:
        scores = score(_read(known, texts)) | notes
        return {**scores, "variant": "letters", "labels": labels, "judge": None}
    prompt = judging.prompt("mmvp")
    replies = judge.replies(_prompts(known, texts, prompt))
    words = [first_word(reply) for reply in replies.values()]
    result = score([None if word is None else word == "yes" for word in words])
    return {**result, **notes, "variant": "judge", "labels": labels, **judging.named(prompt)}


def _rows(questions: Sequence[Question], path: Path) -> list[Row]:
    """The questions as `join` takes them; their number goes by three names."""
    return [
        Row(
            f"{path}, row {number}",
            {**dict.fromkeys(("question_id", "id", "index"), q.index), "question": q.text},
        )
        for number, q in enumerate(questions, 1)
    ]


def _read(questions: Sequence[Question], texts: Sequence[str]) -> list[bool | None]:
    letters = [chosen(text, q.options) for q, text in zip(questions, texts, strict=True)]
    pairs = zip(questions, letters, strict=True)
    return [None if letter is None else letter == q.label for q, letter in pairs]


def _prompts(
    questions: Sequence[Question], texts: Sequence[str], template: Template
) -> dict[str, str]:
    return {
        str(question.index): template.fill(
            question=question.text,
            options=" ".join(f"({letter}) {text}" for letter, text in question.options.items()),
            label=f"({question.label}) {question.options[question.label]}",
            answer=text,
        )
        for question, text in zip(questions, texts, strict=True)
    }


def read_questions(path: Path, labels: str = "published") -> list[Question]:
    """The questions of `Questions.csv`, in its order."""
    if labels not in LABELS:
        raise EvalError(f"MMVP labels {labels!r}: expected one of {', '.join(LABELS)}.")
    reader = csv.DictReader(read_text(path).splitlines())
    columns = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in COLUMNS if name not in columns]:
        raise EvalError(f"{path}: no column {missing[0]!r}; found {', '.join(columns) or 'none'}.")
    parsed = [_question(f"{path}, row {number}", row) for number, row in enumerate(reader, 1)]
    return [_corrected(question) for question in parsed] if labels == "corrected" else parsed


def _corrected(question: Question) -> Question:
    other = {"a": "b", "b": "a"}[question.label]
    return replace(question, label=other) if question.index in SWAPPED else question


def _question(where: str, row: Mapping[str, str | None]) -> Question:
    index, text, listed, label = ((row[name] or "").strip() for name in COLUMNS)
    options = re.fullmatch(r"\(a\)(.+)\(b\)(.+)", listed, re.DOTALL)
    if options is None or label not in ("(a)", "(b)") or not index.isdecimal():
        raise EvalError(
            f"{where}: Index {index!r}, Options {listed!r}, Correct Answer {label!r}; expected a "
            "number, '(a) ... (b) ...', and (a) or (b)."
        )
    texts = {letter: options.group(n).strip() for n, letter in enumerate("ab", 1)}
    return Question(int(index), text, texts, label[1])


@dataclass(frozen=True)
class MmvpSettings(FolderSettings):
    """Settings of MMVP (arXiv 2401.06209): Questions.csv, and the images in "MMVP Images/".

    labels: published, or corrected in four places
    """

    labels: Labels = "published"


class Mmvp(Benchmark):
    """The questions with their options; the facts are the pair, the options and the label."""

    name = "mmvp"
    settings = MmvpSettings
    measures: ClassVar[Mapping[str, Measure]] = {
        "pair_accuracy": Measure("pair_accuracy %", direction=1, brief=True),
        "accuracy": Measure("accuracy %", direction=1, right=True),
        "unreadable": Measure("unreadable %", direction=-1),
    }
    score_files = staticmethod(score_files)

    def samples(self, settings: MmvpSettings, source: Source) -> Iterator[Sample]:
        for question in read_questions(source.folder / "Questions.csv", settings.labels):
            options = " ".join(f"({letter}) {text}" for letter, text in question.options.items())
            prompt = settings.prompt.replace("{question}", f"{question.text} {options}")
            image = source.find(f"MMVP Images/{question.index}.jpg")
            facts = {"pair": (question.index - 1) // 2, "options": dict(question.options)}
            facts |= {"label": question.label}
            yield Sample(self.name, ALL, f"{question.index:03d}", image, prompt, facts)

    def tallies(self, rows: Rows, settings: MmvpSettings, folder: Path) -> dict[str, Tally]:
        return {"": tally(_marks(rows))}

    def score(self, rows: Rows, settings: MmvpSettings, folder: Path) -> dict[str, Any]:
        return {**score(_marks(rows)), "variant": "letters", "labels": settings.labels}


def _marks(rows: Rows) -> list[bool | None]:
    right: list[bool | None] = []
    for row in (row for pair in pairs(rows, "pair") for row in pair):
        letter = chosen(row["answer"], row["options"])
        right.append(None if letter is None else letter == row["label"])
    return right
