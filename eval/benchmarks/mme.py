"""MME: yes/no questions in pairs, one yes and one no an image; a pair counts when both are right.

Fu et al. 2023, https://arxiv.org/abs/2306.13394. One line of an answer file, `existence.txt`, with
tabs between: `000000006040.jpg  Is there a refrigerator in this image? Please answer yes or no.
Yes  Yes`. The hallucination subset is existence, count, position and color.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from eval.benchmarks.answers import answer_text, label, read_answers
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
from eval.benchmarks.joining import capped
from eval.benchmarks.parsers import MME_PARSERS, ParserName, parser_named, reading_flags
from eval.benchmarks.rows import read_text
from eval.errors import EvalError

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TOTALS = {"hallucination": HALLUCINATION, "perception": PERCEPTION, "cognition": COGNITION}


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    image: file name
    text: the question
    label: "yes" or "no"
    """

    image: str
    text: str
    label: str


@dataclass(frozen=True)
class Answer:
    """One line of an answer file.

    image: file name
    label: "yes" or "no"
    text: the answer
    """

    image: str
    label: str
    text: str


def score(
    subtasks: Mapping[str, Sequence[Answer]], seed: int = 0, parser: str = "official"
) -> dict[str, Any]:
    """Accuracy and acc+ of every subtask, as shares with 95 % intervals over images.

    `score` of a subtask is 100 (accuracy + acc+), 200 at most; the totals are there as far as all
    their subtasks are. `parser` is one of MME_PARSERS. Answers of one image follow each other, two
    an image (see `read_folder`).
    """
    if not subtasks:
        raise EvalError("MME: there are no answers to score.")
    parts = {
        name: {
            **tally(answers, parser=parser).report(seed),
            "flags": reading_flags([answer.text for answer in answers], parser, MME_PARSERS),
        }
        for name, answers in subtasks.items()
    }
    totals = {
        total: sum(parts[name]["score"] for name in names)
        for total, names in TOTALS.items()
        if parts.keys() >= set(names)
    }
    return {"subtasks": parts, "totals": totals, "parser": parser}


def tally(*subtasks: Sequence[Answer], parser: str = "official") -> Tally:
    """What each image adds to the score of a subtask, or to the sum over several.

    The two answers about an image follow each other.
    """
    answers = [answer for subtask in subtasks for answer in subtask]
    read = parser_named(parser, MME_PARSERS)
    readings = np.array([read(answer.text) or "" for answer in answers]).reshape(-1, 2)
    labels = np.array([answer.label for answer in answers]).reshape(-1, 2)
    right = readings == labels
    # in a sum every subtask counts as much as the others, however many images it has
    weights = [len(answers) / len(subtask) for subtask in subtasks for _ in subtask[::2]]
    columns = {
        "questions": np.full(len(right), 2),
        "right": right.sum(axis=1),
        "images": np.ones(len(right)),
        "images_right": right.all(axis=1),
        "points": np.array(weights) * (50 * right.sum(axis=1) + 100 * right.all(axis=1)),
        "unreadable": (readings == "").sum(axis=1),
        "said_yes": (readings == "yes").sum(axis=1),
    }
    return Tally(columns, _ratios, right.ravel())


def _ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    return {
        "score": (c["points"], c["images"]),
        "accuracy": (c["right"], c["questions"]),
        "accuracy_plus": (c["images_right"], c["images"]),
        "yes_ratio": (c["said_yes"], c["questions"]),
        "unreadable": (c["unreadable"], c["questions"]),
    }


def score_files(answers: Path, parser: ParserName = "official") -> dict[str, Any]:
    """MME answers: hallucination subset, perception, cognition, as far as there are files.

    answers (DIR|FILE): folder of SUBTASK.txt with four columns, or a log of lmms-eval or VLMEvalKit
    parser: how an answer is read
    """
    return score(read_log(answers) if answers.is_file() else read_folder(answers), parser=parser)


def read_log(path: Path) -> dict[str, list[Answer]]:
    """Answers in a log of VLMEvalKit or lmms-eval: rows with `category`, label and answer.

    Two rows are about one image: those whose `image_path` is the same, or `question_id` (lmms-eval
    calls the image so).
    """
    images: dict[tuple[str, str], list[Answer]] = {}
    for row in read_answers(path):
        name = str(row.first("image_path", "image", "question_id"))
        answer = Answer(name, label(row, "label"), answer_text(row))
        images.setdefault((row.text("category"), name), []).append(answer)
    odd = [f"{name} ({len(pair)})" for (_, name), pair in images.items() if len(pair) != 2]
    if odd:
        raise EvalError(f"{path}: expected two answers an image; found {capped(odd)}.")
    subtasks: dict[str, list[Answer]] = {}
    for (subtask, _), pair in images.items():
        subtasks.setdefault(subtask, []).extend(pair)
    if strange := sorted(set(subtasks) - {*PERCEPTION, *COGNITION}):
        raise EvalError(f"{path}: {capped(strange)} is no subtask of MME.")
    return subtasks


def read_folder(folder: Path) -> dict[str, list[Answer]]:
    """Answers of every known subtask that the folder has a file of."""
    lines = {name: _lines(path, 4) for name, path in _files(folder).items()}
    return {
        name: [Answer(image, label, text) for image, _, label, text in rows]
        for name, rows in lines.items()
    }


def read_questions(folder: Path) -> dict[str, list[Question]]:
    """Questions of every known subtask that the folder has a file of; three columns."""
    lines = {name: _lines(path, 3) for name, path in _files(folder).items()}
    return {
        name: [Question(image, text, label) for image, text, label in rows]
        for name, rows in lines.items()
    }


def _files(folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.txt" for name in (*PERCEPTION, *COGNITION)}
    existing = {name: path for name, path in files.items() if path.is_file()}
    if not existing:
        raise EvalError(
            f"{folder}: no file of MME in it. Expected SUBTASK.txt, for example "
            f"{', '.join(f'{name}.txt' for name in HALLUCINATION)}."
        )
    return existing


def _lines(path: Path, columns: int) -> list[list[str]]:
    """The columns of every line, the label in small letters; two lines an image."""
    lines = [
        (f"{path}, line {number}", line)
        for number, line in enumerate(read_text(path).split("\n"), 1)
        if line.strip()
    ]
    rows = [_columns(where, line, columns) for where, line in lines]
    for (where, _), one, two in zip(lines[1::2], rows[::2], rows[1::2], strict=False):
        if one[0] != two[0]:
            raise EvalError(
                f"{where}: {two[0]} does not pair with {one[0]} above it. Two lines that follow "
                "each other must ask about one image: keep the order of the question file."
            )
    if len(rows) % 2:
        raise EvalError(f"{path}: {len(rows)} lines; expected pairs, two an image.")
    return rows


def _columns(where: str, line: str, count: int) -> list[str]:
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) != count:
        answer = ", and the answer (take line breaks and tabs out of it)" if count == 4 else ""
        raise EvalError(
            f"{where}: {len(columns)} columns; expected image, question, Yes or No{answer}, with "
            "tabs between."
        )
    label = columns[2].lower()
    if label not in ("yes", "no"):
        raise EvalError(f"{where}: the third column is {columns[2]!r}; expected Yes or No.")
    return [*columns[:2], label, *columns[3:]]


@dataclass(frozen=True)
class MmeSettings(FolderSettings):
    """Settings of MME (arXiv 2306.13394): SUBTASK.txt with the questions, images in SUBTASK/.

    parser: official (the first four characters) or another of `eval.benchmarks.parsers`
    """

    parser: ParserName = "official"


class Mme(Benchmark):
    """The questions of every subtask; the facts are the subtask, the pair and the label."""

    name = "mme"
    settings = MmeSettings
    measures: ClassVar[Mapping[str, Measure]] = {
        "score": Measure("score", "points", direction=1, brief=True),
        "accuracy": Measure("accuracy %", direction=1, right=True),
        "accuracy_plus": Measure("accuracy_plus %", direction=1),
        "yes_ratio": Measure("yes_ratio %"),
        "unreadable": Measure("unreadable %", direction=-1),
    }
    score_files = staticmethod(score_files)

    def samples(self, settings: MmeSettings, source: Source) -> Iterator[Sample]:
        for subtask, questions in read_questions(source.folder).items():
            for number, question in enumerate(questions):
                file = question.image
                image = source.find(f"{subtask}/{file}", f"{subtask}/images/{file}")
                prompt = settings.prompt.replace("{question}", question.text)
                facts = {"subtask": subtask, "pair": number // 2, "label": question.label}
                yield Sample(self.name, ALL, f"{subtask}-{number:04d}", image, prompt, facts)

    def tallies(self, rows: Rows, settings: MmeSettings, folder: Path) -> dict[str, Tally]:
        """By subtask, and of the subtasks that make up a total."""
        given, parser = _answers(rows), settings.parser
        result = {f"subtasks {name}": tally(part, parser=parser) for name, part in given.items()}
        for total, names in TOTALS.items():
            if given.keys() >= set(names):
                result[f"totals {total}"] = tally(*(given[name] for name in names), parser=parser)
        return result

    def score(self, rows: Rows, settings: MmeSettings, folder: Path) -> dict[str, Any]:
        return score(_answers(rows), parser=settings.parser)


def _answers(rows: Rows) -> dict[str, list[Answer]]:
    subtasks: dict[str, list[Answer]] = {}
    for pair in pairs(rows, "subtask", "pair"):
        answers = [Answer(row["image"], row["label"], row["answer"]) for row in pair]
        subtasks.setdefault(pair[0]["subtask"], []).extend(answers)
    return subtasks
