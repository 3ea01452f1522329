"""HallusionBench as a benchmark of a run: what it asks, and what its numbers are called."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from eval.benchmarks import hallusionbench
from eval.benchmarks.base import ALL, Benchmark, FolderSettings, Measure, Rows, Sample, Source
from eval.benchmarks.hallusionbench import Question
from eval.benchmarks.hallusionbench.diagnosis import KINDS
from eval.benchmarks.hallusionbench.files import read_questions, score_files
from eval.benchmarks.intervals import Tally
from eval.benchmarks.parsers import ParserName

BETTER = ("q_acc", "f_acc", "easy_a_acc", "hard_a_acc", "easy_q_acc", "hard_q_acc")
WORSE = ("figures_inconsistent", "figures_wrong")


@dataclass(frozen=True)
class HallusionBenchSettings(FolderSettings):
    """Settings of HallusionBench (arXiv 2310.14566), beside those of every folder.

    parser: a name of `eval.benchmarks.parsers`. The published reading is a judge's, which a run has
        not: `eval score hallusionbench --judge`
    """

    max_new_tokens: int = 128
    parser: ParserName = "strict"


class HallusionBench(Benchmark):
    """Yes/no questions about figures; the facts are the question as its file has it."""

    name = "hallusionbench"
    settings = HallusionBenchSettings
    before: ClassVar[Mapping[str, Any]] = {"parser": "strict"}
    measures: ClassVar[Mapping[str, Measure]] = {
        "a_acc": Measure("a_acc %", direction=1, brief=True, right=True),
        **{key: Measure(f"{key} %", direction=1) for key in BETTER},
        **{key: Measure(f"{key} %", direction=-1) for key in WORSE},
        **{key: Measure(f"{key} %") for key in ("yes_bias", "false_yes", "unclear", *KINDS)},
    }
    main = "a_acc"
    score_files = staticmethod(score_files)

    def samples(self, settings: HallusionBenchSettings, source: Source) -> Iterator[Sample]:
        """Of the questions with a figure only: a run always shows an image."""
        for question in read_questions(source.folder / "HallusionBench.json"):
            if question.visual_input == "0":
                continue
            folder = f"{question.category}/{question.subcategory}/"
            file = f"{folder}{question.set_id}_{question.figure_id}.png"
            image = source.find(f"hallusion_bench/{file}", file)
            prompt = settings.prompt.replace("{question}", question.text)
            facts = {"question": asdict(question)}
            yield Sample(self.name, ALL, "-".join(question.key), image, prompt, facts)

    def tallies(
        self, rows: Rows, settings: HallusionBenchSettings, folder: Path
    ) -> dict[str, Tally]:
        questions, texts = _given(rows)
        pairs = zip(questions, texts, strict=True)
        verdicts = [hallusionbench.verdict(text, q.label, settings.parser) for q, text in pairs]
        same = hallusionbench.repeated(questions, texts, settings.parser)
        return {"": hallusionbench.tally(questions, verdicts, same)}

    def score(self, rows: Rows, settings: HallusionBenchSettings, folder: Path) -> dict[str, Any]:
        return hallusionbench.score_parsed(*_given(rows), settings.parser)


def _given(rows: Rows) -> tuple[list[Question], list[str]]:
    return [Question(**row["question"]) for row in rows], [row["answer"] for row in rows]
