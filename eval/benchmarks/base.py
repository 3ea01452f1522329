"""What a benchmark is: what it asks, how its responses are scored, and what its numbers are called.

A benchmark is a subclass of `Benchmark` in a file of its own and one line in `registry.py`, or in a
user's file and named by its import path; docs/add-a-benchmark.md builds one.
"""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from eval.benchmarks.coco import Vocabulary, read_truth
from eval.benchmarks.intervals import Tally
from eval.errors import EvalError

Rows: TypeAlias = Sequence[Mapping[str, Any]]
Scores: TypeAlias = Mapping[str, Any]
ALL = "all"
"""The split of a benchmark that lies in a folder of its own."""


@dataclass(frozen=True)
class Sample:
    """One prompt about one image.

    task: name of the benchmark
    split: part of the data that it belongs to
    id: its name, which no other sample of the task and split has
    image: file of the image
    prompt: text beside it
    facts: what scoring needs of it (truth, label, strategy); they stand in each row of responses
    """

    task: str
    split: str
    id: str
    image: Path
    prompt: str
    facts: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.split, self.id

    @property
    def name(self) -> str:
        return f"sample {self.task} {self.split} {self.id}"


@dataclass(frozen=True)
class Measure:
    """One number of a benchmark, for example `Measure("accuracy %", direction=1, right=True)`.

    label: what tables call it
    unit: "%" of a share in [0, 1], shown times 100; else what is counted: tokens, words, points
    direction: 1 where more is better, -1 where less is, 0 where neither
    brief: whether it is shown where space is short
    right: whether it is the share of right responses, which McNemar's test is about
    free: where saying less lowers it for free, what it is called then
    cure: how to see beside it whether it was lowered so
    cost: what it means, in words, that it got worse while another was lowered for free
    """

    label: str
    unit: str = "%"
    direction: int = 0
    brief: bool = False
    right: bool = False
    free: str = ""
    cure: str = ""
    cost: str = ""

    @property
    def times(self) -> int:
        """By what it is multiplied for reading."""
        return 100 if self.unit == "%" else 1


@dataclass(frozen=True)
class Source:
    """Where a benchmark finds its images and annotations.

    split: part of the data
    folder: where it lies; of a benchmark with a setting `data` that folder, else the run's
    images: file by image id, of a data set in COCO's format; none in a folder of one's own
    sections: settings of every benchmark of the run, by name
    seed: of whatever is drawn
    limit: how many images a split the run keeps at most, None for all
    """

    split: str
    folder: Path
    images: Mapping[int, Path] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    limit: int | None = None
    _objects: dict[str, dict[int, list[str]]] = field(default_factory=dict, repr=False)

    def objects(self, vocabulary: Vocabulary | None = None) -> Mapping[int, list[str]]:
        """The objects of each image by its annotations and captions (None: the shipped words)."""
        words = vocabulary or Vocabulary.load()
        key = f"{words.rules} {words.name}"
        if key not in self._objects:
            self._objects[key] = read_truth(self.folder, words, self.images)
        return self._objects[key]

    def shuffled(self) -> list[int]:
        """Image ids in the seed's own order; the first few stay the same when more are taken."""
        order = sorted(self.images)
        random.Random(self.seed).shuffle(order)
        return order

    def find(self, *names: str) -> Path:
        """The first of these places that has a file, else the first of them."""
        paths = [self.folder / name for name in names]
        return next((path for path in paths if path.is_file()), paths[0])


@dataclass(frozen=True)
class FolderSettings:
    """Settings of a benchmark in a folder of its own (`python -m eval data NAME`, and its images).

    data: the folder
    prompt: holds {question}, which stands for the benchmark's own wording
    max_new_tokens: where a response is cut
    """

    data: str | None = None
    prompt: str = "{question}"
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise EvalError(f"prompt {self.prompt!r}: it must hold {{question}}")


def lacks(benchmark: str, function: str) -> EvalError:
    """The error of a benchmark that a run cannot ask or score."""
    return EvalError(
        f"{benchmark} defines no {function}, which a run needs: write it as in "
        f"docs/add-a-benchmark.md"
    )


class Benchmark:
    """What a run, a table, a comparison and a sweep need to know of a benchmark.

    A subclass gives `name`, `settings`, `measures`, `samples` and `tallies`; the rest has defaults.

    name: its task in a configuration, and the section of its settings
    settings: dataclass of the section, with max_new_tokens, and with `data` where the benchmark
        lies in a folder of its own; None where it is scored from files only
    before: settings with which runs were read before these settings existed
    measures: what its numbers are called, in the order of a table
    main: the measure that a sweep tunes unless another is named ("": the first)
    plot: one measure drawn by part, or two against each other; none: not drawn
    required: what every score of it holds; one that does not is of an older version
    score_files: scores of files made elsewhere; its arguments are the options of `score NAME`
    commands: further commands by name, their options made in the same way
    """

    name: ClassVar[str]
    settings: ClassVar[Any] = None
    before: ClassVar[Mapping[str, Any]] = {}
    measures: ClassVar[Mapping[str, Measure]] = {}
    main: ClassVar[str] = ""
    plot: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[Collection[str]] = ()
    score_files: ClassVar[Callable[..., Mapping[str, Any]] | None] = None
    commands: ClassVar[Mapping[str, Callable[..., None]]] = {}

    def samples(self, settings: Any, source: Source) -> Iterable[Sample]:
        """The requests of one split."""
        raise lacks(self.name, "samples")

    def tallies(self, rows: Rows, settings: Any, folder: Path) -> Mapping[str, Tally]:
        """What each sample adds to the measures, by part; a benchmark of one part calls it "".

        `rows` are the responses of one split, each with the facts of its sample, `folder` is the
        run's, with the scoring files in it.
        """
        raise lacks(self.name, "tallies")

    def score(self, rows: Rows, settings: Any, folder: Path) -> dict[str, Any]:
        """The scores of one split: values, counts and 95 % intervals, by part."""
        tallies = self.tallies(rows, settings, folder)
        reports = {part: tally.report() for part, tally in tallies.items()}
        return reports.get("", reports)

    def scoring_files(self, settings: Any) -> Sequence[Path]:
        """What a run copies into its folder so that it can be scored again."""
        return ()

    def reader(self, settings: Any, folder: Path) -> str:
        """What reads the responses, in words; runs that are read otherwise do not compare."""
        parser = getattr(settings, "parser", None)
        return "one rule" if parser is None else f"the {parser} parser"

    def parts(self, scores: Scores) -> dict[str, Scores]:
        """Whatever has intervals in the scores of one split, by its name; "" is all of it."""
        return dict(_with_intervals(scores))

    def key(self, part: str, measure: str) -> str:
        """What other programs call a measure of a part."""
        return " ".join(filter(None, (self.name, part, measure)))

    def label(self, part: str, measure: str) -> str:
        """What tables call a measure of a part."""
        return f"{self.key(part, '')}, {self.measures[measure].label}"

    def size(self, scores: Scores) -> str:
        """What the scores of one split are of."""
        return self.name

    def notes(self, split: str, scores: Scores) -> Iterator[str]:
        """What a reader of the numbers of one split should know."""
        for part, measured in self.parts(scores).items():
            yield from (f"{self.key(part, '')}, {flag}" for flag in measured.get("flags", ()))

    def alarms(self, scores: Scores) -> Mapping[str, str] | None:
        """What rings, with the sentence that says why; None for a benchmark without alarms."""
        return None


def _with_intervals(scores: Scores, name: str = "") -> Iterator[tuple[str, Scores]]:
    if "intervals" in scores:
        yield name, scores
    for key, part in scores.items():
        if isinstance(part, Mapping) and key != "intervals":
            yield from _with_intervals(part, f"{name} {key}".strip())


def pairs(rows: Rows, *keys: str) -> list[Rows]:
    """Rows that belong together, two by two; one whose partner was skipped is left out."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    whole: list[Rows] = [pair for pair in groups.values() if len(pair) == 2]
    if not whole:
        raise EvalError("no pair of questions has both its answers yet: run it again to resume")
    return whole
