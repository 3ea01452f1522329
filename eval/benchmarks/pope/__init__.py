"""POPE: yes/no questions about objects that are, and that are not, in an image.

Li et al. 2023, https://arxiv.org/abs/2305.10355; official files and code: RUCAIBox/POPE. One row:
`{"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
"text": "Is there a snowboard in the image?", "label": "yes"}`.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from eval.benchmarks import answers as logs
from eval.benchmarks.intervals import Numbers, Tally, grouped, measure
from eval.benchmarks.joining import image_name, object_of_question
from eval.benchmarks.parsers import otherwise, parser_named, read_otherwise, readable
from eval.benchmarks.rows import Row, read_rows
from eval.errors import EvalError

Strategy: TypeAlias = Literal["random", "popular", "adversarial"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Question:
    """One question.

    question_id: its number
    image: file name
    text: the question
    label: "yes" or "no"
    object: what it is about, "" where the text is not of POPE's form
    split: "" where it is unknown
    """

    question_id: int
    image: str
    text: str
    label: str
    object: str = ""
    split: str = ""


def read_questions(path: Path) -> list[Question]:
    """Questions of an official file, of LLaVA's, whose `category` becomes the split, or of the
    hub's (`question`, `answer`, `image_source`)."""
    rows = [logs.plain(row) for row in read_rows(path)]
    for row in rows:
        if not image_name(row):
            row.text("image", "image_source", "image_path")  # says what is missing
    return questions_of(rows)


def questions_of(rows: Sequence[Row]) -> list[Question]:
    """The questions in rows that hold a label."""
    return [_question(row, number) for number, row in enumerate(rows, 1)]


def _question(row: Row, position: int) -> Question:
    # in the hub's form, and in no other, `answer` is the label
    label = logs.label(row, "label", "answer")
    text = row.text("text", "question", "query")
    ids = [name for name in ("question_id", "index", "id") if row.has(name)]
    number = row.number(*ids) if ids else position
    split = row.text("category") if row.has("category") else ""
    return Question(number, image_name(row), text, label, object_of_question(text), split)


def build_questions(
    objects: Mapping[str, Sequence[str]],
    strategy: Strategy,
    images: int | Sequence[str] = 500,
    per_image: int = 3,
    seed: int = 0,
) -> list[Question]:
    """Yes and no questions in turn, `2 * per_image` an image, by the published algorithm.

    `objects` maps image names to the objects in them. `images` are drawn from those with at least
    `per_image` objects (the same ones for every strategy at one seed), or given by name. Positives
    are an image's first objects in list order. The negative after each is neither in the image nor
    asked before: any object seen ("random"), the most frequent one ("popular"), or the one that is
    most often together with the positive ("adversarial"); the last two fall back to "random".
    """
    if strategy not in STRATEGIES:
        raise EvalError(f"POPE strategy {strategy!r}; expected one of {', '.join(STRATEGIES)}.")
    generator = random.Random(seed)
    names = _drawn(objects, images, per_image, generator)
    chosen = {name: list(objects[name]) for name in names}
    ranks = _ranks(chosen, strategy)
    seen = sorted({thing for things in chosen.values() for thing in things})
    drawn = (
        (name, thing, label)
        for name, present in chosen.items()
        for thing, label in _about(name, present[:per_image], present, ranks, seen, generator)
    )
    return [
        Question(number, name, _text(thing), label, thing, strategy)
        for number, (name, thing, label) in enumerate(drawn, 1)
    ]


def _drawn(
    objects: Mapping[str, Sequence[str]],
    images: int | Sequence[str],
    per_image: int,
    generator: random.Random,
) -> list[str]:
    enough = [name for name, things in objects.items() if len(things) >= per_image]
    if isinstance(images, int):
        if not 0 < images <= len(enough):
            raise EvalError(
                f"POPE: {images} images asked for, but {len(enough)} of {len(objects)} have at "
                f"least {per_image} objects. Ask for 1 to {len(enough)} images."
            )
        return generator.sample(enough, images)
    if poor := sorted(set(images) - set(enough)):
        raise EvalError(
            f"POPE: image {poor[0]!r} has fewer than {per_image} known objects "
            f"({len(poor)} such images). Leave it out or lower the questions per image."
        )
    return list(images)


def _ranks(objects: Mapping[str, Sequence[str]], strategy: Strategy) -> Mapping[str, list[str]]:
    """Candidates for a negative, best first, by the positive that it follows."""
    if strategy == "adversarial":
        pairs = cooccurrence(objects)
        return {thing: [name for name, _ in c.most_common()] for thing, c in pairs.items()}
    frequency = Counter(thing for things in objects.values() for thing in things)
    popular = [thing for thing, _ in frequency.most_common()] if strategy == "popular" else []
    return dict.fromkeys(frequency, popular)


def cooccurrence(objects: Mapping[str, Sequence[str]]) -> dict[str, Counter[str]]:
    """How many images each object shares with each other object, in first-seen order."""
    pairs: dict[str, Counter[str]] = {}
    for things in objects.values():
        for thing in things:
            pairs.setdefault(thing, Counter()).update(x for x in things if x != thing)
    return pairs


def _about(
    image: str,
    positives: Sequence[str],
    present: Sequence[str],
    ranks: Mapping[str, list[str]],
    seen: Sequence[str],
    generator: random.Random,
) -> Iterator[tuple[str, str]]:
    """(object, label) of the questions about one image."""
    taken = set(present)
    for positive in positives:
        yield positive, "yes"
        negative = next((thing for thing in ranks[positive] if thing not in taken), None)
        if negative is None:
            left = [thing for thing in seen if thing not in taken]
            if not left:
                raise EvalError(
                    f"POPE: every object of the {len(seen)} seen is in image {image!r} or asked "
                    "already. Ask fewer questions per image or take more images."
                )
            negative = generator.choice(left)
        taken.add(negative)
        yield negative, "no"


def _text(thing: str) -> str:
    article = "an" if thing.startswith(("a", "e", "i", "o", "u")) else "a"
    return f"Is there {article} {thing} in the image?"


def score(
    answers: Sequence[str],
    labels: Sequence[str],
    images: Sequence[str] | None = None,
    seed: int = 0,
    parser: str = "official",
) -> dict[str, Any]:
    """Counts, accuracy, precision, recall, F1 and yes-ratio of paired answers; "yes" is positive.

    An answer that the parser (see `parsers`) leaves unread is wrong: neither a yes nor a no.
    `unreadable` is the share of answers that the strict parser cannot read, whichever is used;
    `read_otherwise` counts those that it reads, but not as the parser does.
    Shares lie in [0, 1]. The 95 % intervals are drawn over questions, or over `images` where they
    are given (the questions about one image stand or fall together). `EvalError` on unpaired or
    unknown labels.
    """
    if not answers or len(answers) != len(labels):
        raise EvalError(f"POPE: {len(answers)} answers for {len(labels)} labels; expected pairs.")
    if unknown := sorted({label for label in labels if label not in ("yes", "no")}):
        raise EvalError(f"POPE: label {unknown[0]!r}; expected 'yes' or 'no'.")
    counts = tally(answers, labels, images, parser).counts
    other = read_otherwise(answers, parser)
    measured = measure(counts, ratios, seed)
    return {
        "n": len(answers),
        **{name: int(counts[name].sum()) for name in ("tp", "fp", "tn", "fn")},
        **measured["values"],
        "questions": len(answers),
        "intervals": measured["intervals"],
        "parser": parser,
        "read_otherwise": other,
        "flags": [
            *(f"{name}: nothing to divide by, 0 by definition" for name in measured["undefined"]),
            *otherwise(other, len(answers), parser),
        ],
    }


def counts_by_question(
    answers: Sequence[str], labels: Sequence[str], parser: str = "official"
) -> dict[str, Numbers]:
    """What each answer adds, by name of the count: `[questions]` each."""
    read = parser_named(parser)
    readings = np.array([read(answer) or "" for answer in answers])
    yes, no, absent = (
        readings == "yes",
        readings == "no",
        np.array([label == "no" for label in labels]),
    )
    counts = {
        "tp": yes & ~absent,
        "fp": yes & absent,
        "tn": no & absent,
        "fn": no & ~absent,
        "present": ~absent,
        "asked": np.ones(len(answers)),
        "unreadable": np.array([not readable(answer) for answer in answers]),
    }
    return {name: np.asarray(column, dtype=np.float64) for name, column in counts.items()}


def tally(
    answers: Sequence[str],
    labels: Sequence[str],
    images: Sequence[str] | None,
    parser: str = "official",
) -> Tally:
    """What each image adds, or each question where no `images` are given."""
    counts = counts_by_question(answers, labels, parser)
    return Tally(grouped(counts, images), ratios, counts["tp"] + counts["tn"])


def ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    """The formulas of POPE."""
    total, said_yes, present = c["asked"], c["tp"] + c["fp"], c["present"]
    return {
        "accuracy": (c["tp"] + c["tn"], total),
        "precision": (c["tp"], said_yes),
        "recall": (c["tp"], present),
        "f1": (2 * c["tp"], said_yes + present),
        "yes_ratio": (said_yes, total),
        "unreadable": (c["unreadable"], total),
    }
