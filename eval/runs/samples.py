"""The samples of a run: which images, which prompts, and the facts that scoring will need.

Data is the pocket world, drawn on demand, or a COCO folder: images with `instances_SPLIT.json` and
`captions_SPLIT.json`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import pocket
from eval.benchmarks.base import ALL, Benchmark, Source
from eval.benchmarks.base import Sample as Sample
from eval.benchmarks.coco import image_id_in, image_path
from eval.benchmarks.rows import read_json
from eval.errors import EvalError
from eval.errors import notice as notice
from eval.pocket import world
from eval.runs.config import Config

POCKET_SPLITS = ("test", "break")
POCKET_SCENES = 200


def samples(config: Config, scenes: Path) -> list[Sample]:
    """The samples of a run in order: of COCO or the pocket world, then of folders of their own.

    Pocket scenes are drawn below `scenes`.
    """
    tasks = [(b, getattr(config.sections[b.name], "data", None)) for b in config.benchmarks]
    shared = [benchmark for benchmark, folder in tasks if folder is None]
    collected: list[Sample] = []
    for split in _splits(config) if shared else ():
        source = _source(config, split, scenes)
        for benchmark in shared:
            collected += _kept(config, benchmark, source)
    for benchmark, folder in tasks:
        if folder is not None:
            about = config.sections, config.seed, config.limit
            collected += _kept(config, benchmark, Source(ALL, Path(folder), {}, *about))
    return collected


def _kept(config: Config, benchmark: Benchmark, source: Source) -> list[Sample]:
    """Of one split only the first `limit` images, and of those the half that is requested."""
    candidates = list(benchmark.samples(config.sections[benchmark.name], source))
    images = list(dict.fromkeys(sample.image for sample in candidates))[: config.limit]
    kept = {image for image in images if config.part in (None, part(image))}
    if missing := sorted(image for image in kept if not image.is_file()):
        name = benchmark.name
        raise EvalError(
            f"{missing[0]}: no such image ({len(missing)} of the {len(kept)} images that {name} "
            f"needs are missing). python -m eval data {name} --to DIR says where they come from."
        )
    return [sample for sample in candidates if sample.image in kept]


def part(image: Path) -> str:
    """In which half an image is, to tune on or to report; its name decides, for good."""
    return "tune" if hashlib.sha256(image.name.encode()).digest()[0] % 2 else "report"


def describe(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counts and checksums that pin the data of a run.

    One of the image list of each split, one of all prompts and all facts.
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
    """The requested splits, else the pocket world's test and break, or a folder's only one."""
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


def _source(config: Config, split: str, scenes: Path) -> Source:
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
    return Source(split, folder, images, config.sections, config.seed, config.limit)


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
    """As many scenes as any benchmark may want."""
    counts = []
    for name, section in config.sections.items():
        images = getattr(section, "images", 1)
        if isinstance(images, str):
            raise EvalError(
                f"{name}.images: the pocket world is drawn, expected a number of scenes"
            )
        counts.append(POCKET_SCENES if images is None else images)
    return max(counts)


def _path(folder: Path, record: Mapping[str, Any]) -> Path | None:
    try:
        return image_path(folder, record)
    except EvalError:
        return None


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
