"""The samples of a run: which images, which prompts, and the facts that scoring will need.

Data is the pocket world, drawn on demand, or a COCO folder: images with `instances_SPLIT.json` and
`captions_SPLIT.json`.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval import pocket
from eval.benchmarks.coco import Vocabulary, id_in_name, image_id_in, image_path, read_truth
from eval.runs.config import Config
from eval.errors import EvalError
from eval.pocket import world
from eval.benchmarks.pope import STRATEGIES, Question, Strategy, build_questions, read_questions
from eval.benchmarks.rows import read_json, read_text

POCKET_SPLITS = ("test", "break")
POCKET_SCENES = 200


@dataclass(frozen=True)
class Sample:
    """One question to the model. `facts` are what scoring needs of it (truth, label, strategy)."""

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
class Source:
    """One split: where its images are, and the objects of each image."""

    split: str
    folder: Path
    images: Mapping[int, Path]
    truth: Mapping[int, Sequence[str]]


def samples(config: Config, scenes: Path) -> list[Sample]:
    """Samples of COCO or the pocket world in order; pocket scenes are drawn below `scenes`."""
    synonyms = None if config.chair.synonyms is None else Path(config.chair.synonyms)
    vocabulary = Vocabulary.load(synonyms, config.chair.rules)
    makers = {"chair": _chair, "pope": _pope}
    found: list[Sample] = []
    for split in _splits(config):
        source = _source(config, split, scenes, vocabulary)
        for task in (task for task in config.tasks if task in makers):
            found += makers[task](config, source)
    return [s for s in found if config.part is None or part(s.image) == config.part]


def part(image: Path) -> str:
    """In which half an image is, to tune on or to report; its name decides, for good."""
    return "tune" if hashlib.sha256(image.name.encode()).digest()[0] % 2 else "report"


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counts and checksums that pin the data of a run.

    One of the image list of each split, one of all that is asked and all that is known.
    """
    splits = dict.fromkeys(sample.split for sample in samples)
    images = {
        split: list(dict.fromkeys(s.image.name for s in samples if s.split == split))
        for split in splits
    }
    lines = (json.dumps([*s.key, s.image.name, s.prompt, s.facts], sort_keys=True) for s in samples)
    return {
        "samples": len(samples),
        "samples_sha256": _sha256(lines),
        "images": {
            split: {"count": len(names), "sha256": _sha256(names)}
            for split, names in images.items()
        },
    }


def _splits(config: Config) -> Sequence[str]:
    """The splits asked for, else the pocket world's test and break, or a folder's only one."""
    if config.data == "pocket":
        known: Sequence[str] = pocket.SPLITS
        chosen: Sequence[str] = config.splits or POCKET_SPLITS
    else:
        known = sorted(path.stem.removeprefix("instances_") for path in _annotations(config.data))
        chosen = config.splits or known
        if len(chosen) > 1 and not config.splits:
            raise EvalError(
                f"{config.data} holds several splits ({', '.join(known)}): name those to use, "
                f"for example --set splits=[{known[0]}]"
            )
    for split in chosen:
        if split not in known:
            raise EvalError(
                f"splits: {config.data} has no split {split}; it has {', '.join(known)}"
            )
    return chosen


def _annotations(data: str) -> list[Path]:
    folder = Path(data)
    files = [*folder.glob("instances_*.json"), *folder.glob("annotations/instances_*.json")]
    if not files:
        raise EvalError(
            f"data: {data} holds no instances_*.json, in it or in its annotations/. Expected: "
            f"pocket, or a folder of COCO images with their annotations (--set data=DIR)"
        )
    return files


def _source(config: Config, split: str, scenes: Path, vocabulary: Vocabulary) -> Source:
    folder = Path(config.data)
    if config.data == "pocket":
        folder = scenes / split
        world.write(split, _scene_count(config), folder)
    file = next(path for path in _annotations(str(folder)) if path.stem == f"instances_{split}")
    records = _records(file)
    images = {number: path for number, record in records.items() if (path := _path(folder, record))}
    if len(images) < len(records):
        notice(f"{split}: {len(images)} of the {len(records)} images in {file} have a file")
    if not images:
        raise EvalError(
            f"{folder}: no image of {split} found, for example {records[min(records)]['file_name']}"
        )
    return Source(split, folder, images, read_truth(folder, vocabulary, images))


def _records(file: Path) -> dict[int, Mapping[str, Any]]:
    data = read_json(file)
    listed = data.get("images") if isinstance(data, dict) else None
    if not listed:
        raise EvalError(f"{file}: expected the COCO format, with a list 'images' that is not empty")
    for row, record in enumerate(listed, 1):
        if missing := [field for field in ("id", "file_name") if field not in record]:
            raise EvalError(f"{file}, images, entry {row}: no field {missing[0]!r}")
    return {image_id_in(str(file), record["id"]): record for record in listed}


def _scene_count(config: Config) -> int:
    scenes = POCKET_SCENES if config.chair.images is None else config.chair.images
    if isinstance(scenes, str):
        raise EvalError("chair.images: the pocket world is drawn, expected a number of scenes")
    return max(scenes, config.pope.images)


def _path(folder: Path, record: Mapping[str, Any]) -> Path | None:
    try:
        return image_path(folder, record)
    except EvalError:
        return None


def _chair(config: Config, source: Source) -> list[Sample]:
    """One caption an image; the facts are the image's id and its true objects."""
    return [
        Sample(
            "chair",
            source.split,
            str(number),
            source.images[number],
            config.chair.prompt,
            {"image_id": number, "truth": list(source.truth[number])},
        )
        for number in _chosen(config, source)
    ]


def _chosen(config: Config, source: Source) -> list[int]:
    """The ids of the images to caption: listed in a file, or drawn with the run's seed."""
    if isinstance(config.chair.images, str):
        path = config.chair.images
        listed = [image_id_in(path, line) for line in read_text(Path(path)).split()]
        for place, number in enumerate(listed):
            if number in listed[:place]:
                raise EvalError(f"{path} lists image {number} twice: delete one of the two")
            if number not in source.images:
                raise EvalError(
                    f"{path} lists image {number}, which {source.folder} lacks "
                    f"(as a file or in instances_{source.split}.json)"
                )
        return listed[: config.limit]
    ids = _shuffled(source.images, config.seed)
    wanted = config.chair.images and min(config.chair.images, config.limit or config.chair.images)
    if wanted is not None and wanted > len(ids):
        raise EvalError(
            f"chair.images asks for {wanted} images of {source.split}, but {source.folder} has "
            f"{len(ids)}; put the images there, or --set chair.images={len(ids)}"
        )
    return ids[: wanted or config.limit]


def _shuffled(ids: Iterable[int], seed: int) -> list[int]:
    """The ids in the seed's own order; the first few stay the same when more are taken."""
    order = sorted(ids)
    random.Random(seed).shuffle(order)
    return order


def _pope(config: Config, source: Source) -> list[Sample]:
    """The questions of every strategy; the facts are its name, the number and the true answer."""
    names = _by_name(source)
    return [
        Sample(
            "pope",
            source.split,
            f"{strategy}-{question.question_id}",
            _question_image(source, question, names),
            config.pope.prompt.replace("{question}", question.text),
            {"strategy": strategy, "question_id": question.question_id, "label": question.label},
        )
        for strategy in STRATEGIES
        if strategy in config.pope.strategies
        for question in _questions(config, source, strategy)
    ]


def _questions(config: Config, source: Source, strategy: Strategy) -> list[Question]:
    """The questions of one strategy, of the first `limit` images only where the run has a limit."""
    if config.pope.questions is not None:
        questions = read_questions(Path(config.pope.questions.replace("{strategy}", strategy)))
    else:
        numbers = {path: number for number, path in source.images.items()}
        objects = {name: source.truth[numbers[path]] for name, path in _by_name(source).items()}
        task = config.pope
        questions = build_questions(objects, strategy, task.images, task.per_image, config.seed)
    images = list(dict.fromkeys(question.image for question in questions))[: config.limit]
    return [question for question in questions if question.image in set(images)]


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


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def notice(text: str) -> None:
    """A line for the person who watches, beside the progress bar."""
    tqdm.write(text, file=sys.stderr)
