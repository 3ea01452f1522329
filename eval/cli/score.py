"""python -m eval score: score a run folder again, or files that were made elsewhere.

For every benchmark that can be scored the table holds its function and its options.

An option `--truth-file` is the function's argument `truth_file`; without it the function's own
default holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import (
    amber,
    hallusionbench_files,
    llava_bench,
    mme,
    mmhal,
    mmvp,
    object_halbench,
    scoring,
)
from eval.benchmarks.amber_nouns import READERS
from eval.benchmarks.coco import RULES
from eval.benchmarks.parsers import AMBER_PARSERS, HALLUSIONBENCH_PARSERS, MME_PARSERS, PARSERS
from eval.cli import Commands
from eval.reports import table
from eval.runs import runner


@dataclass(frozen=True)
class Option:
    """One option of the command line; `settings` go to argparse."""

    flag: str
    settings: Mapping[str, Any]

    @property
    def argument(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def file(flag: str, meaning: str, required: bool = True, **more: Any) -> Option:
    return Option(flag, {"type": Path, "help": meaning, "required": required, **more})


def choice(flag: str, meaning: str, names: Iterable[str]) -> Option:
    """The first name is the default; the function itself refuses others than these."""
    listed = list(dict.fromkeys(names))
    return Option(flag, {"help": f"{meaning} (default: {listed[0]})", "metavar": "|".join(listed)})


@dataclass(frozen=True)
class Score:
    """One benchmark: its help, function and options."""

    help: str
    run: Callable[..., Mapping[str, Any]]
    options: tuple[Option, ...]

    def __call__(self, options: argparse.Namespace) -> None:
        values = {option.argument: getattr(options, option.argument) for option in self.options}
        chosen = {name: value for name, value in values.items() if value is not None}
        scoring.print_result(self.run(**chosen), options.json)


JUDGE = (
    Option(
        "--judge", {"metavar": "URL", "help": "endpoint of the OpenAI chat form (default: off)"}
    ),
    Option("--judge-model", {"metavar": "NAME", "help": "model to ask there"}),
    file("--verdicts", "file of its replies, appended to; alone: score these", required=False),
)
TEMPLATE = file("--template", "prompt for the judge (default: our own wording)", required=False)
EXPORT = file("--export", "write the answers as the published judge takes them", required=False)

SUBSET = Option(
    "--subset",
    {
        "action": "store_const",
        "const": True,
        "help": "leave out answers to questions that are not in the file",
    },
)

SCORES: Mapping[str, Score] = {
    "chair": Score(
        "captions made elsewhere, against COCO objects",
        scoring.score_chair,
        (
            file("--captions", "JSON list or JSON lines"),
            file("--truth", "objects file or COCO folder", metavar="OBJECTS.json|COCO_DIR"),
            file("--synonyms", "object vocabulary (default: the one that ships)", required=False),
            choice("--rules", "how captions, and the captions behind a truth, are read", RULES),
        ),
    ),
    "pope": Score(
        "yes/no answers made elsewhere, against POPE questions",
        scoring.score_pope,
        (
            file("--answers", "JSON, JSON lines, TSV or XLSX; a log of lmms-eval or VLMEvalKit"),
            file(
                "--questions",
                "official, LLaVA's or the hub's (not needed where a log holds the labels)",
                required=False,
            ),
            choice("--parser", "how an answer is read", PARSERS),
            SUBSET,
        ),
    ),
    "amber": Score(
        "AMBER responses (id, response): descriptions, questions or both",
        amber.score_files,
        (
            file("--responses", "JSON list in the official form"),
            file("--data", "annotations.json, relation.json, safe_words.txt", metavar="DIR"),
            choice("--nouns", "what counts as a noun; nltk is official", READERS),
            choice("--similarity", "when two nouns mean the same", ("exact", "spacy")),
            choice("--parser", "how an answer is read", ("official", *AMBER_PARSERS)),
        ),
    ),
    "mme": Score(
        "MME answers: hallucination subset, perception, cognition, as far as there are files",
        mme.score_folder,
        (
            file(
                "--answers",
                "folder of SUBTASK.txt with four columns, or a log of lmms-eval or VLMEvalKit",
                metavar="DIR|FILE",
            ),
            choice("--parser", "how an answer is read", ("official", *MME_PARSERS)),
        ),
    ),
    "hallusionbench": Score(
        "HallusionBench answers, by a parser or a judge",
        hallusionbench_files.score_files,
        (
            file("--answers", "rows with model_prediction"),
            file("--questions", "HallusionBench.json"),
            choice("--parser", "how an answer is read without a judge", HALLUSIONBENCH_PARSERS),
            *JUDGE,
            TEMPLATE,
            file("--same-template", "prompt that holds two answers together", required=False),
        ),
    ),
    "mmvp": Score(
        "MMVP answers in pairs, by the option that they name or a judge",
        mmvp.score_files,
        (
            file("--answers", "rows with question_id and response"),
            file("--questions", "Questions.csv"),
            choice("--labels", "as published, or four of them corrected", mmvp.LABELS),
            SUBSET,
            *JUDGE,
            TEMPLATE,
        ),
    ),
    "object-halbench": Score(
        "Object HalBench responses, by rules or a judge: response and mention level",
        object_halbench.score_files,
        (
            file("--responses", "JSON list or JSON lines with image_id and answer"),
            file("--truth", "objects file or COCO folder", metavar="OBJECTS.json|COCO_DIR"),
            file("--synonyms", "synonyms_refine.txt (default: what ships)", required=False),
            choice("--rules", "how responses are read", RULES),
            *JUDGE,
            TEMPLATE,
        ),
    ),
    "mmhal": Score(
        "MMHal-Bench answers, rated by a judge",
        mmhal.score_files,
        (
            file("--answers", "the official form, or rows in the questions' order"),
            file("--questions", "the official form without answers", required=False),
            SUBSET,
            EXPORT,
            *JUDGE,
            TEMPLATE,
        ),
    ),
    "llava-bench": Score(
        "LLaVA-Bench (in the wild) answers, marked by a judge beside GPT-4's",
        llava_bench.score_files,
        (
            file("--answers", "JSON lines with question_id and text"),
            file("--data", "questions, context and answers_gpt4 .jsonl", metavar="DIR"),
            SUBSET,
            EXPORT,
            *JUDGE,
            file("--rules", "rule.json of LLaVA (default: our own wording)", required=False),
        ),
    ),
}


def add(commands: Commands) -> None:
    """Add `score FOLDER` (short for `score run FOLDER`), and `score NAME ...` per benchmark."""
    parser = commands.add_parser(
        "score", help="score a run folder, or files made elsewhere; no model"
    )
    kinds = parser.add_subparsers(required=True, metavar=f"RUN | {' | '.join(SCORES)}")
    folder = kinds.add_parser("run", help="score a run folder again and write its metrics.json")
    folder.add_argument("folder", type=Path, metavar="RUN")
    folder.set_defaults(command=score_run)
    add_scores(kinds)


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the `run` that `score FOLDER` leaves out."""
    words = list(arguments)
    if words[:1] == ["score"] and words[1:] and words[1] not in (*SCORES, "run", "-h", "--help"):
        words.insert(1, "run")
    return words


def score_run(options: argparse.Namespace) -> None:
    """Score a run folder again, and print the table."""
    runner.score(options.folder)
    print(table.markdown([options.folder]))


def add_scores(kinds: Commands) -> None:
    """Add `score NAME` for every benchmark to the sub-parsers of `score`."""
    for name, score in SCORES.items():
        parser = kinds.add_parser(name, help=score.help)
        for option in score.options:
            parser.add_argument(option.flag, **option.settings)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.set_defaults(command=score)
