"""Run a configuration into its folder, and score a folder; generating and scoring are apart.

Scoring reads the folder alone and always gives the same bytes of metrics.json for the same answers.
"""

from __future__ import annotations

import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

import vlm_patch
from eval import chair, dataset, generate, pope
from eval.coco import Vocabulary
from eval.config import Config
from eval.dataset import Sample, notice
from eval.errors import EvalError
from eval.folder import RunFolder, row_key
from eval.generate import Answer

PACKAGES = ("vlm-patch", "torch", "transformers", "pillow")
OURS = (Path(vlm_patch.__file__).parent, Path(__file__).parent)

Load: TypeAlias = Callable[[Config], tuple[Any, Any]]


def run(
    config: Config, out: Path, scenes: Path | None = None, load: Load = generate.load_model
) -> dict[str, Any]:
    """Generate the answers that the folder `out` still lacks, and score it; returns the metrics.

    `scenes` is where pocket scenes are drawn (None: in `out`). `load` gives model and processor; it
    is called only if there is something to generate.
    """
    folder = RunFolder(out)
    samples = dataset.samples(config, scenes or out / "scenes")
    record = folder.open(describe(config, samples))
    done = {row_key(row) for row in folder.rows(repair=True)}
    pending = [sample for sample in samples if sample.key not in done]
    if done and pending:
        notice(f"{out}: {len(done)} of {len(samples)} samples are answered, going on")
    _check_environment(out, record, _environment(config), bool(pending))
    if pending:
        _generate(folder, record, config, pending, len(done), *load(config))
    return score(out)


def _check_environment(
    out: Path, record: Mapping[str, Any], now: Mapping[str, Any], more: bool
) -> None:
    """Say so where answers were made by other versions; keep the new ones if they make more."""
    before = record["environments"][-1]
    if changed := [f"{key} {before.get(key)}" for key in now if before.get(key) != now[key]]:
        notice(f"{out} has answers of {', '.join(changed)}: delete it to make them anew")
        if more:
            record["environments"].append(now)


def describe(config: Config, samples: Sequence[Sample]) -> dict[str, Any]:
    """The record of a run at its start: all that is needed to repeat it."""
    return {
        "settings": config.settings(),
        "data": dataset.describe(samples),
        "environments": [_environment(config)],
        "patches": [],
        "notes": [],
    }


def score(out: Path) -> dict[str, Any]:
    """Score the answers in a run folder and write its metrics.json; needs the folder alone."""
    folder = RunFolder(out)
    record, rows = folder.record(), folder.rows()
    if not rows:
        raise EvalError(f"{folder.answers} holds no answers yet: run it again to go on")
    metrics: dict[str, Any] = {"answered": len(rows), "samples": record["data"]["samples"]}
    for task, split in sorted({(row["task"], row["split"]) for row in rows}):
        part = [row for row in rows if (row["task"], row["split"]) == (task, split)]
        scores = _chair(out, record, part) if task == "chair" else _pope(part)
        metrics.setdefault(task, {})[split] = scores
    folder.write_metrics(metrics)
    return metrics


def _chair(
    out: Path, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """CHAIR of one split, and the share of captions that ended before the token limit."""
    task = record["settings"]["chair"]
    synonyms = None if task["synonyms"] is None else out / Path(task["synonyms"]).name
    captions = [(int(row["image_id"]), str(row["answer"])) for row in rows]
    truth = {int(row["image_id"]): row["truth"] for row in rows}
    ended = sum(bool(row["ended"]) for row in rows) / len(rows)
    scores = chair.score(captions, truth, Vocabulary.load(synonyms), task["rules"])
    return {**scores, "ended_share": ended}


def _pope(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """POPE of one split by strategy; questions about one image stand or fall together."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["strategy"], []).append(row)
    return {
        strategy: pope.score(
            [row["answer"] for row in part],
            [row["label"] for row in part],
            [row["image"] for row in part],
        )
        for strategy, part in parts.items()
    }


def _generate(
    folder: RunFolder,
    record: dict[str, Any],
    config: Config,
    pending: Sequence[Sample],
    done: int,
    model: Any,
    processor: Any,
) -> None:
    """Answer the pending samples; what the patch says of itself is kept, also on interruption."""
    torch.manual_seed(config.seed)
    with (
        _noting(record["notes"]),
        _wrapped(model, processor, config) as patch,
        tqdm(
            desc=folder.path.name, total=done + len(pending), initial=done, unit=" answers"
        ) as bar,
    ):
        try:
            for batch in generate.answers(model, processor, pending, config):
                folder.append([_line(sample, answer) for sample, answer in batch])
                bar.update(len(batch))
        finally:
            said = [] if patch is None else [patch.describe().splitlines()]
            record["patches"] += [lines for lines in said if lines not in record["patches"]]
            folder.write_record(record)


def _wrapped(model: Any, processor: Any, config: Config) -> AbstractContextManager[Any]:
    methods = config.build_methods()
    if not methods:
        return nullcontext()
    try:
        patch: AbstractContextManager[Any] = vlm_patch.wrap(
            model, *methods, processor=processor, layers=config.layers, heads=config.heads
        )
    except (TypeError, ValueError) as error:
        raise EvalError(f"model {config.model} cannot be wrapped: {error}") from error
    return patch


@contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Warnings of this project are shown as notices and kept in `notes`, each once."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep(message: Any, category: Any, filename: str, *more: Any, **named: Any) -> None:
            if not any(Path(filename).is_relative_to(ours) for ours in OURS):
                show(message, category, filename, *more, **named)
            elif str(message) not in notes:
                notes.append(str(message))
                notice(f"note: {message}")

        warnings.showwarning = keep
        yield


def _line(sample: Sample, answer: Answer) -> dict[str, Any]:
    """One line of answers.jsonl."""
    asked = {"task": sample.task, "split": sample.split, "id": sample.id}
    shown = {"image": sample.image.name, "prompt": sample.prompt}
    said = {"answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
    return {**asked, **shown, **said, **sample.facts}


def _environment(config: Config) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": config.device_map or config.device or generate.best_device(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with -dirty where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None
