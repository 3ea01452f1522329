"""All tasks of a run, and those that have a folder of their own: AMBER, MME, MMVP, HallusionBench.

Such a task is three functions: what is asked, how the answers are scored, and what each sample adds
to the scores, for comparing runs. What scoring needs is in the facts of each answer, and for AMBER
in two word lists that a run copies into its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from eval.benchmarks import (
    amber,
    amber_nouns,
    echo,
    hallusionbench,
    hallusionbench_files,
    mme,
    mmvp,
)
from eval.benchmarks.intervals import Tally
from eval.benchmarks.rows import read_rows
from eval.errors import EvalError
from eval.runs import samples as dataset
from eval.runs.config import OWN_FOLDER, Config
from eval.runs.samples import Sample

Rows: TypeAlias = Sequence[Mapping[str, Any]]
SPLIT = "all"
# how answers were read by runs from before this was a setting
PARSERS_BEFORE = {"amber": "strict", "mme": "official", "hallusionbench": "strict"}


@dataclass(frozen=True)
class Task:
    """`samples` of a folder; `score` and `tallies` of answers, the run's folder and the task's
    settings. Tallies have the names of `measures`, without the task's own."""

    samples: Callable[[Path, Mapping[str, Any]], Iterable[Sample]]
    score: Callable[[Rows, Path, Mapping[str, Any]], dict[str, Any]]
    tallies: Callable[[Rows, Path, Mapping[str, Any]], dict[str, Tally]]


def samples(config: Config, scenes: Path) -> list[Sample]:
    """The samples of a run in order: of COCO or the pocket world, then of the other benchmarks."""
    on_coco = any(task not in OWN_FOLDER for task in config.tasks)
    found = dataset.samples(config, scenes) if on_coco else []
    for name in (task for task in config.tasks if task in TASKS):
        asked = list(TASKS[name].samples(Path(getattr(config, name).data), config.settings()[name]))
        images = list(dict.fromkeys(sample.image for sample in asked))[: config.limit]
        wanted = {image for image in images if config.part in (None, dataset.part(image))}
        _require_files(name, sorted(wanted))
        found += [sample for sample in asked if sample.image in wanted]
    return found


def parser_of(task: str, settings: Mapping[str, Any]) -> str:
    """The name of the rule by which the answers of a run are read."""
    return str(settings.get("parser", PARSERS_BEFORE[task]))


def _require_files(task: str, images: Sequence[Path]) -> None:
    if missing := [image for image in images if not image.is_file()]:
        raise EvalError(
            f"{missing[0]}: no such image ({len(missing)} of the {len(images)} images that {task} "
            f"needs are missing). python -m eval data {task} --to DIR says where they come from."
        )


def _sample(
    task: str, name: str, image: Path, prompt: str, settings: Mapping[str, Any], **facts: Any
) -> Sample:
    filled = settings["prompt"].replace("{question}", prompt)
    return Sample(task, SPLIT, name, image, filled, facts)


def _image(folder: Path, *places: str) -> Path:
    """The first of these places that has a file, else the first of them."""
    paths = [folder / place for place in places]
    return next((path for path in paths if path.is_file()), paths[0])


def _amber_samples(folder: Path, settings: Mapping[str, Any]) -> Iterable[Sample]:
    items = amber.read_items(folder / "annotations.json")
    if settings["nouns"] == "nltk" and amber.GENERATIVE in settings["parts"]:
        amber_nouns.require_nltk()  # said before an answer is generated
    for row in read_rows(folder / "query_all.json"):
        number, file = row.number("id"), row.text("image")
        if number not in items:
            raise EvalError(f"{row.where}: id {number} is not in {folder / 'annotations.json'}.")
        item = items[number]
        part = item.type if item.type == amber.GENERATIVE else "discriminative"
        if part in settings["parts"]:
            image = _image(folder, f"image/{file}", f"images/{file}", file)
            facts = {"amber_id": number, "type": item.type, "truth": item.truth}
            facts |= {"hallu": item.hallu, "label": item.answer}
            yield _sample("amber", str(number), image, row.text("query"), settings, **facts)


def _amber_score(rows: Rows, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    found = amber.score(
        *_amber_given(rows, out), settings["nouns"], parser=parser_of("amber", settings)
    )
    described = [row for row in rows if row["type"] == amber.GENERATIVE]
    if described:
        captions = [(row["answer"], row.get("prompt", "")) for row in described]
        found[amber.GENERATIVE]["flags"] = echo.flags(captions)
    return found


def _amber_tallies(rows: Rows, out: Path, settings: Mapping[str, Any]) -> dict[str, Tally]:
    parser = parser_of("amber", settings)
    found = amber.tallies(*_amber_given(rows, out), settings["nouns"], parser=parser)
    apart = {name: name for name in (amber.GENERATIVE, amber.OVERALL)}
    return {apart.get(name, f"discriminative {name}"): part for name, part in found.items()}


def _amber_given(
    rows: Rows, out: Path
) -> tuple[list[tuple[int, str]], dict[int, amber.Item], amber_nouns.Lexicon]:
    items = {
        row["amber_id"]: amber.Item(
            row["type"], row["truth"], row["hallu"], row["label"], row["image"]
        )
        for row in rows
    }
    given = [(row["amber_id"], row["answer"]) for row in rows]
    return given, items, amber_nouns.read_lexicon(out)


def _mme_samples(folder: Path, settings: Mapping[str, Any]) -> Iterable[Sample]:
    for subtask, questions in mme.read_questions(folder).items():
        for number, question in enumerate(questions):
            file = question.image
            image = _image(folder, f"{subtask}/{file}", f"{subtask}/images/{file}")
            facts = {"subtask": subtask, "pair": number // 2, "label": question.label}
            name = f"{subtask}-{number:04d}"
            yield _sample("mme", name, image, question.text, settings, **facts)


def _mme_score(rows: Rows, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    return mme.score(_mme_answers(rows), parser=parser_of("mme", settings))


def _mme_tallies(rows: Rows, out: Path, settings: Mapping[str, Any]) -> dict[str, Tally]:
    """By subtask, and of the subtasks that make up a total."""
    subtasks, parser = _mme_answers(rows), parser_of("mme", settings)
    found = {
        f"subtasks {name}": mme.tally(answers, parser=parser) for name, answers in subtasks.items()
    }
    for total, names in mme.TOTALS.items():
        if subtasks.keys() >= set(names):
            found[f"totals {total}"] = mme.tally(*(subtasks[name] for name in names), parser=parser)
    return found


def _mme_answers(rows: Rows) -> dict[str, list[mme.Answer]]:
    subtasks: dict[str, list[mme.Answer]] = {}
    for pair in _pairs(rows, "subtask", "pair"):
        answers = [mme.Answer(row["image"], row["label"], row["answer"]) for row in pair]
        subtasks.setdefault(pair[0]["subtask"], []).extend(answers)
    return subtasks


def _mmvp_samples(folder: Path, settings: Mapping[str, Any]) -> Iterable[Sample]:
    for question in mmvp.read_questions(folder / "Questions.csv", settings["labels"]):
        options = " ".join(f"({letter}) {text}" for letter, text in question.options.items())
        facts = {"pair": (question.index - 1) // 2, "options": dict(question.options)}
        yield _sample(
            "mmvp",
            f"{question.index:03d}",
            _image(folder, f"MMVP Images/{question.index}.jpg"),
            f"{question.text} {options}",
            settings,
            **facts,
            label=question.label,
        )


def _mmvp_score(rows: Rows, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    labels = settings.get("labels", "published")
    return {**mmvp.score(_mmvp_marks(rows)), "variant": "letters", "labels": labels}


def _mmvp_tallies(rows: Rows, out: Path, settings: Mapping[str, Any]) -> dict[str, Tally]:
    return {"": mmvp.tally(_mmvp_marks(rows))}


def _mmvp_marks(rows: Rows) -> list[bool | None]:
    right: list[bool | None] = []
    for row in (row for pair in _pairs(rows, "pair") for row in pair):
        letter = mmvp.chosen(row["answer"], row["options"])
        right.append(None if letter is None else letter == row["label"])
    return right


def _hallusionbench_samples(folder: Path, settings: Mapping[str, Any]) -> Iterable[Sample]:
    """Of the questions with a figure only: a run always shows an image."""
    for question in hallusionbench_files.read_questions(folder / "HallusionBench.json"):
        if question.visual_input == "0":
            continue
        place = f"{question.category}/{question.subcategory}/"
        file = f"{place}{question.set_id}_{question.figure_id}.png"
        image = _image(folder, f"hallusion_bench/{file}", file)
        name, facts = "-".join(question.key), {"question": asdict(question)}
        yield _sample("hallusionbench", name, image, question.text, settings, **facts)


def _hallusionbench_score(rows: Rows, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    questions = [hallusionbench.Question(**row["question"]) for row in rows]
    texts = [row["answer"] for row in rows]
    return hallusionbench.score_parsed(questions, texts, parser_of("hallusionbench", settings))


def _hallusionbench_tallies(rows: Rows, out: Path, settings: Mapping[str, Any]) -> dict[str, Tally]:
    questions = [hallusionbench.Question(**row["question"]) for row in rows]
    texts, parser = [row["answer"] for row in rows], parser_of("hallusionbench", settings)
    pairs = zip(questions, texts, strict=True)
    verdicts = [hallusionbench.verdict(text, q.label, parser) for q, text in pairs]
    same = hallusionbench.repeated(questions, texts, parser)
    return {"": hallusionbench.tally(questions, verdicts, same)}


def _pairs(rows: Rows, *keys: str) -> list[Rows]:
    """Rows that belong together, two by two; one whose partner was skipped is left out."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    pairs: list[Rows] = [pair for pair in found.values() if len(pair) == 2]
    if not pairs:
        raise EvalError("no pair of questions has both its answers yet: run it again to go on")
    return pairs


TASKS: Mapping[str, Task] = {
    "amber": Task(_amber_samples, _amber_score, _amber_tallies),
    "mme": Task(_mme_samples, _mme_score, _mme_tallies),
    "mmvp": Task(_mmvp_samples, _mmvp_score, _mmvp_tallies),
    "hallusionbench": Task(_hallusionbench_samples, _hallusionbench_score, _hallusionbench_tallies),
}


def measures(scores: Mapping[str, Any], name: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(name, scores) of everything below `name` that has intervals of its own."""
    if "intervals" in scores:
        yield name, scores
    for key, part in scores.items():
        if isinstance(part, Mapping) and key != "intervals":
            yield from measures(part, f"{name} {key}")
