"""CHAIR as a benchmark: captions of COCO or pocket images, and what its numbers are called.

CHAIR never stands alone: recall, length, repetition and silence are the rows below it, since
shorter, looping or empty captions lower CHAIR for free.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import chair, echo
from eval.benchmarks.base import Benchmark, Measure, Rows, Sample, Scores, Source
from eval.benchmarks.chair import LENGTHS, alarm
from eval.benchmarks.chair.files import score_files
from eval.benchmarks.coco import Rules, Vocabulary, image_id_in
from eval.benchmarks.intervals import Tally
from eval.benchmarks.rows import read_text
from eval.errors import EvalError

CURE = ", so look at it at the first 40, 60 and 100 words"
MEASURES = {
    **{
        key: Measure(label, direction=-1, brief=True, free="CHAIR", cure=CURE)
        for key, label in (("chair_s", "CHAIR_S %"), ("chair_i", "CHAIR_I %"))
    },
    "chair_i_distinct": Measure("CHAIR_I %, each object once", direction=-1),
    **{f"chair_s_at_{n}": Measure(f"CHAIR_S %, first {n} words", direction=-1) for n in LENGTHS},
    **{f"chair_i_at_{n}": Measure(f"CHAIR_I %, first {n} words", direction=-1) for n in LENGTHS},
    "recall": Measure("recall %", direction=1, brief=True, cost="recall went down"),
    "precision": Measure("precision %", direction=1),
    "f1": Measure("F1 %", direction=1, brief=True),
    "mean_tokens": Measure("length in tokens", "tokens", brief=True, cost="captions got shorter"),
    "distinct_4gram_share": Measure("distinct 4-grams %", direction=1),
    "looping_share": Measure("looping %", direction=-1, cost="more captions repeat themselves"),
    "no_object_share": Measure(
        "naming no object %", direction=-1, cost="more captions name nothing"
    ),
}


@dataclass(frozen=True)
class ChairSettings:
    """Settings of CHAIR (arXiv 1809.02156).

    prompt: asks for a caption
    max_new_tokens: where it is cut
    images: how many of each split, a file that lists image ids, or null for all
    rules: the scorer's rule set
    synonyms: file of the object vocabulary, null for the one that ships
    """

    prompt: str = "Please describe this image in detail."
    max_new_tokens: int = 512
    images: int | str | None = None
    rules: Rules = "pattern"
    synonyms: str | None = None

    def vocabulary(self, folder: Path | None = None) -> Vocabulary:
        """The words for objects; a list of one's own is looked for in a run's folder if given."""
        if self.synonyms is None:
            return Vocabulary.load(None, self.rules)
        path = Path(self.synonyms)
        return Vocabulary.load(path if folder is None else folder / path.name, self.rules)


class Chair(Benchmark):
    """One caption an image; the facts are the image's id and its true objects."""

    name = "chair"
    settings = ChairSettings
    measures = MEASURES
    main = "f1"
    plot = ("recall", "chair_s")
    required = (*MEASURES, "alarms")
    score_files = staticmethod(score_files)

    def samples(self, settings: ChairSettings, source: Source) -> Iterator[Sample]:
        truth = source.objects(settings.vocabulary())
        for number in _chosen(settings, source):
            facts = {"image_id": number, "truth": list(truth[number])}
            image = source.images[number]
            yield Sample(self.name, source.split, str(number), image, settings.prompt, facts)

    def tallies(self, rows: Rows, settings: ChairSettings, folder: Path) -> dict[str, Tally]:
        words = settings.vocabulary(folder)
        return {"": Tally(chair.counts_by_caption(*_captions(rows), words), chair.ratios)}

    def score(self, rows: Rows, settings: ChairSettings, folder: Path) -> dict[str, Any]:
        """CHAIR, and the share of captions that ended before the token limit."""
        scores = chair.score(*_captions(rows), settings.vocabulary(folder))
        texts = [(str(row["answer"]), str(row.get("prompt", ""))) for row in rows]
        scores["flags"] += echo.flags(texts)
        return {**scores, "ended_share": sum(bool(row["ended"]) for row in rows) / len(rows)}

    def scoring_files(self, settings: ChairSettings) -> list[Path]:
        return [] if settings.synonyms is None else [Path(settings.synonyms)]

    def reader(self, settings: ChairSettings, folder: Path) -> str:
        words = settings.vocabulary(folder)
        return f"{words.rules} rules with {words.name}"

    def key(self, part: str, measure: str) -> str:
        return measure

    def label(self, part: str, measure: str) -> str:
        return self.measures[measure].label

    def size(self, scores: Scores) -> str:
        return f"{scores['counts']['captions']} captions"

    def notes(self, split: str, scores: Scores) -> Iterator[str]:
        yield from (f"{split}, {text}" for text in [*scores["alarms"], *scores["flags"]])
        if (cut := 1 - scores["ended_share"]) > 0:
            yield f"{split}: {100 * cut:.1f} % of the captions were cut by the token limit"

    def alarms(self, scores: Scores) -> Mapping[str, str]:
        return alarm.ringing(scores)


def _captions(rows: Rows) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """(image id, caption) pairs, and the true objects of each image."""
    captions = [(int(row["image_id"]), str(row["answer"])) for row in rows]
    return captions, {int(row["image_id"]): row["truth"] for row in rows}


def _chosen(settings: ChairSettings, source: Source) -> list[int]:
    """The ids of the images to caption: listed in a file, or drawn with the run's seed."""
    if isinstance(settings.images, str):
        return _listed(settings.images, source)
    ids = source.shuffled()
    count = settings.images and min(settings.images, source.limit or settings.images)
    if count is not None and count > len(ids):
        raise EvalError(
            f"chair.images asks for {count} images of {source.split}, but {source.folder} has "
            f"{len(ids)}; put the images there, or --set chair.images={len(ids)}"
        )
    return ids[: count or source.limit]


def _listed(path: str, source: Source) -> list[int]:
    listed = [image_id_in(path, line) for line in read_text(Path(path)).split()]
    for index, number in enumerate(listed):
        if number in listed[:index]:
            raise EvalError(f"{path} lists image {number} twice: delete one of the two")
        if number not in source.images:
            raise EvalError(
                f"{path} lists image {number}, which {source.folder} lacks "
                f"(as a file or in instances_{source.split}.json)"
            )
    return listed[: source.limit]
