"""POPE as a benchmark: its questions about COCO or pocket images, and its numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from eval.benchmarks import pope
from eval.benchmarks.base import Benchmark, Measure, Rows, Sample, Scores, Source
from eval.benchmarks.coco import id_in_name, image_path
from eval.benchmarks.intervals import Tally
from eval.benchmarks.parsers import ParserName
from eval.benchmarks.pope import STRATEGIES, Question, Strategy
from eval.benchmarks.pope.files import score_files, write_questions
from eval.errors import EvalError
from eval.schema import check_positive


@dataclass(frozen=True)
class PopeSettings:
    """Settings of POPE (arXiv 2305.10355).

    prompt: holds {question}
    max_new_tokens: where an answer is cut
    images: of each split that questions are built of
    per_image: objects that are there, and as many that are not
    strategies: how the objects that are not there are chosen
    questions: path of the official question files with {strategy} in it; null builds questions from
        the annotations with the run's seed
    parser: official (all that it cannot read is a yes), strict (that is neither, and wrong) or
        another of `eval.benchmarks.parsers`
    """

    prompt: str = "{question}"
    max_new_tokens: int = 10
    images: int = 500
    per_image: int = 3
    strategies: tuple[Strategy, ...] = STRATEGIES
    questions: str | None = None
    parser: ParserName = "official"

    def __post_init__(self) -> None:
        check_positive("pope", self, "per_image")
        if "{question}" not in self.prompt:
            raise EvalError(f"pope.prompt is {self.prompt!r}: it must hold {{question}}")
        if self.questions is not None and "{strategy}" not in self.questions:
            raise EvalError(
                f"pope.questions is {self.questions!r}: it must hold {{strategy}}, "
                f"as in coco_pope_{{strategy}}.json"
            )


class Pope(Benchmark):
    """The questions of every strategy; the facts are its name, the number and the true answer.

    The objects are read as the section of CHAIR says.
    """

    name = "pope"
    settings = PopeSettings
    measures: ClassVar[Mapping[str, Measure]] = {
        "accuracy": Measure("accuracy %", direction=1, brief=True, right=True),
        "f1": Measure("F1 %", direction=1),
        "yes_ratio": Measure("answered yes %"),
    }
    main = "accuracy"
    plot = ("accuracy",)
    score_files = staticmethod(score_files)
    commands: ClassVar[Mapping[str, Any]] = {"questions": write_questions}

    def samples(self, settings: PopeSettings, source: Source) -> Iterator[Sample]:
        names = _by_name(source)
        for strategy in (name for name in STRATEGIES if name in settings.strategies):
            for q in _questions(settings, source, names, strategy):
                yield Sample(
                    self.name,
                    source.split,
                    f"{strategy}-{q.question_id}",
                    _question_image(source, q, names),
                    settings.prompt.replace("{question}", q.text),
                    {"strategy": strategy, "question_id": q.question_id, "label": q.label},
                )

    def tallies(self, rows: Rows, settings: PopeSettings, folder: Path) -> dict[str, Tally]:
        given = _by_strategy(rows)
        return {part: pope.tally(*columns, settings.parser) for part, columns in given.items()}

    def score(self, rows: Rows, settings: PopeSettings, folder: Path) -> dict[str, Any]:
        """By strategy; questions about one image stand or fall together."""
        given = _by_strategy(rows)
        return {
            part: pope.score(*columns, parser=settings.parser) for part, columns in given.items()
        }

    def parts(self, scores: Scores) -> dict[str, Scores]:
        return {strategy: scores[strategy] for strategy in STRATEGIES if strategy in scores}

    def key(self, part: str, measure: str) -> str:
        return "_".join(filter(None, (self.name, part, measure)))

    def label(self, part: str, measure: str) -> str:
        return f"{f'POPE {part}'.strip()}, {self.measures[measure].label}"

    def size(self, scores: Scores) -> str:
        sizes = dict.fromkeys(part["questions"] for part in scores.values())
        return ", ".join(f"{count} questions a POPE strategy" for count in sizes)

    def notes(self, split: str, scores: Scores) -> Iterator[str]:
        for strategy, part in self.parts(scores).items():
            where = f"{split}, POPE {strategy}"
            yield from (f"{where}, {flag}" for flag in part["flags"])
            if (share := part["unreadable"]) > 0:
                yield f"{where}: {100 * share:.1f} % of answers are unreadable"
            if part["parser"] != "official":
                yield f"{where}: answers are read by the {part['parser']} parser"


def _by_strategy(rows: Rows) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Answers, labels and images by the strategy of their questions."""
    parts: dict[str, list[Mapping[str, Any]]] = {name: [] for name in STRATEGIES}
    for row in rows:
        parts[row["strategy"]].append(row)
    return {
        name: ([r["answer"] for r in part], [r["label"] for r in part], [r["image"] for r in part])
        for name, part in parts.items()
        if part
    }


def _questions(
    settings: PopeSettings, source: Source, names: Mapping[str, Path], strategy: Strategy
) -> Sequence[Question]:
    """The questions of one strategy, of the first `limit` images only where the run has a limit."""
    if settings.questions is not None:
        questions = pope.read_questions(Path(settings.questions.replace("{strategy}", strategy)))
    else:
        truth = source.objects(source.sections["chair"].vocabulary())
        numbers = {path: number for number, path in source.images.items()}
        objects = {name: truth[numbers[path]] for name, path in names.items()}
        drawn = settings.images, settings.per_image, source.seed
        questions = pope.build_questions(objects, strategy, *drawn)
    images = {*list(dict.fromkeys(question.image for question in questions))[: source.limit]}
    return [question for question in questions if question.image in images]


def _by_name(source: Source) -> dict[str, Path]:
    """The images in the order of their ids by file name, which is how questions name them."""
    names: dict[str, Path] = {}
    for path in (source.images[number] for number in sorted(source.images)):
        if path.name in names:
            raise EvalError(
                f"{names[path.name]} and {path} have one file name, and by that POPE's questions "
                f"name images: rename one of them, or leave pope out of the tasks"
            )
        names[path.name] = path
    return names


def _question_image(source: Source, question: Question, names: Mapping[str, Path]) -> Path:
    """The image with the question's file name, else with the id that this name states."""
    if question.image in names:
        return names[question.image]
    number = id_in_name(question.image)
    if number is not None and number in source.images:
        return source.images[number]
    return image_path(source.folder, {"file_name": question.image})
