"""AMBER as a benchmark of a run: what it asks, and what its numbers are called."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from eval.benchmarks import amber, echo
from eval.benchmarks.amber import GENERATIVE, OVERALL, Item
from eval.benchmarks.amber.files import read_items, score_files
from eval.benchmarks.amber.nouns import LEXICON, Lexicon, Nouns, read_lexicon, require_nltk
from eval.benchmarks.base import ALL, Benchmark, FolderSettings, Measure, Rows, Sample, Source
from eval.benchmarks.intervals import Tally
from eval.benchmarks.parsers import ParserName
from eval.benchmarks.rows import read_rows
from eval.errors import EvalError

DISCRIMINATIVE = "discriminative"


@dataclass(frozen=True)
class AmberSettings(FolderSettings):
    """Settings of AMBER (arXiv 2311.07397), beside those of every folder.

    parts: descriptions, questions or both
    nouns: how descriptions are read: nltk (official) or approximate, see `amber.nouns`
    parser: official ("Yes" or "No" to the letter) or another of `eval.benchmarks.parsers`
    """

    max_new_tokens: int = 512
    parts: tuple[Literal["generative", "discriminative"], ...] = ("generative", "discriminative")
    nouns: Nouns = "nltk"
    parser: ParserName = "official"


class Amber(Benchmark):
    """Descriptions and yes/no questions; the facts are an item of the annotations."""

    name = "amber"
    settings = AmberSettings
    before: ClassVar[Mapping[str, Any]] = {"parser": "strict"}
    measures: ClassVar[Mapping[str, Measure]] = {
        "chair": Measure("chair %", direction=-1, brief=True, free="CHAIR"),
        "cover": Measure("cover %", direction=1, brief=True, cost="fewer true words are covered"),
        "hal": Measure("hal %", direction=-1, free="CHAIR"),
        "cog": Measure("cog %", direction=-1),
        "mean_words": Measure("mean_words", "words", cost="descriptions got shorter"),
        "accuracy": Measure("accuracy %", direction=1, brief=True, right=True),
        "precision": Measure("precision %", direction=1),
        "recall": Measure("recall %", direction=1),
        "f1": Measure("f1 %", direction=1),
        "unreadable": Measure("unreadable %", direction=-1),
        "amber_score": Measure("amber_score %", direction=1, brief=True),
    }
    main = "amber_score"
    score_files = staticmethod(score_files)

    def samples(self, settings: AmberSettings, source: Source) -> Iterator[Sample]:
        items = read_items(source.folder / "annotations.json")
        if settings.nouns == "nltk" and GENERATIVE in settings.parts:
            require_nltk()  # said before a response is generated
        for row in read_rows(source.folder / "query_all.json"):
            number, file = row.number("id"), row.text("image")
            if number not in items:
                annotations = source.folder / "annotations.json"
                raise EvalError(f"{row.where}: id {number} is not in {annotations}.")
            item = items[number]
            if (item.type if item.type == GENERATIVE else DISCRIMINATIVE) in settings.parts:
                image = source.find(f"image/{file}", f"images/{file}", file)
                prompt = settings.prompt.replace("{question}", row.text("query"))
                facts = {"amber_id": number, "type": item.type, "truth": item.truth}
                facts |= {"hallu": item.hallu, "label": item.answer}
                yield Sample(self.name, ALL, str(number), image, prompt, facts)

    def tallies(self, rows: Rows, settings: AmberSettings, folder: Path) -> dict[str, Tally]:
        result = amber.tallies(*_given(rows, folder), settings.nouns, parser=settings.parser)
        apart = {name: name for name in (GENERATIVE, OVERALL)}
        return {apart.get(name, f"{DISCRIMINATIVE} {name}"): part for name, part in result.items()}

    def score(self, rows: Rows, settings: AmberSettings, folder: Path) -> dict[str, Any]:
        scores = amber.score(*_given(rows, folder), settings.nouns, parser=settings.parser)
        if described := [row for row in rows if row["type"] == GENERATIVE]:
            captions = [(row["answer"], row.get("prompt", "")) for row in described]
            scores[GENERATIVE]["flags"] = echo.flags(captions)
        return scores

    def scoring_files(self, settings: AmberSettings) -> list[Path]:
        return [Path(str(settings.data)) / name for name in LEXICON]

    def reader(self, settings: AmberSettings, folder: Path) -> str:
        return f"{settings.nouns} rules with {super().reader(settings, folder)}"


def _given(rows: Rows, folder: Path) -> tuple[list[tuple[int, str]], dict[int, Item], Lexicon]:
    items = {
        row["amber_id"]: Item(row["type"], row["truth"], row["hallu"], row["label"], row["image"])
        for row in rows
    }
    given = [(row["amber_id"], row["answer"]) for row in rows]
    return given, items, read_lexicon(folder)
