"""Run a configuration into its folder, and score a folder; generating and scoring are apart.

Scoring reads the folder alone and always gives the same bytes of metrics.json for the same answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.runs import workers, crew, samples as dataset, generate
from eval.benchmarks import chair, echo, pope, tasks
from eval.runs.workers import Desk, Load
from eval.benchmarks.coco import Vocabulary
from eval.runs.config import Config
from eval.runs.samples import Sample, notice
from eval.runs.provenance import environment
from eval.errors import EvalError
from eval.runs.folder import RunFolder
from eval.runs.images import pixel_limit


def run(
    config: Config,
    out: Path,
    scenes: Path | None = None,
    load: Load = generate.load_model,
    samples: Sequence[Sample] | None = None,
) -> dict[str, Any]:
    """Generate the answers that the folder `out` still lacks, and score it; returns the metrics.

    Other processes may be at work in the same folder: each takes what nobody else has taken, and
    one of them scores. `scenes` is where pocket scenes are drawn (None: in `out`). `load` gives
    model and processor; it is called only if there is something to generate. `samples` spares
    reading the data again where it was read by the same settings.
    """
    folder = RunFolder(out)
    if samples is None:
        samples = tasks.samples(config, scenes or out / "scenes")
    record = folder.open(describe(config, samples))
    _check_environment(out, record, environment(config))
    with crew.join(folder.work) as member, pixel_limit(config.max_pixels):
        desk = _desk(config, folder, member)
        try:
            workers.answer(desk, config, samples, load)
        finally:
            if desk.keeper:
                folder.gather_reports()
        return _finish(desk, len(samples))


def _desk(config: Config, folder: RunFolder, member: crew.Member) -> Desk:
    """One process keeps the files of the run: the first, also where all hold one model together."""
    together = config.tp_plan is not None
    first = not together or os.environ.get("RANK", "0") == "0"
    keeper = first and member.take(folder.answers.name) > 0
    if together and first and not keeper:
        raise EvalError(
            f"another process is at work in {folder.path}, and with tp_plan the processes of one "
            f"launch do a run alone: wait for it to end, or choose another --out"
        )
    return Desk(folder, member, keeper, together)


def _finish(desk: Desk, samples: int) -> dict[str, Any]:
    """Bring everything together and score it, or wait for the process that does."""
    folder, waits = desk.folder, desk.together and not desk.keeper
    while waits or not desk.member.take(folder.answers.name):
        if (metrics := folder.finished()) is not None:
            return metrics
        time.sleep(workers.PAUSE)
    folder.gather()
    return score(folder.path)


def _check_environment(out: Path, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say so where the answers that are there were made by other versions."""
    before = record["environments"][-1]
    if changed := [f"{key} {before.get(key)}" for key in now if before.get(key) != now[key]]:
        notice(f"{out} has answers of {', '.join(changed)}: delete it to make them anew")


def describe(config: Config, samples: Sequence[Sample]) -> dict[str, Any]:
    """The record of a run at its start: all that is needed to repeat it."""
    return {
        "settings": config.settings(),
        "data": dataset.describe(samples),
        "decoding": dict(generate.GREEDY),
        "environments": [environment(config)],
        "patches": [],
        "notes": [],
    }


def score(out: Path) -> dict[str, Any]:
    """Score the answers in a run folder and write its metrics.json; needs the folder alone."""
    folder = RunFolder(out)
    record, rows, skipped = folder.record(), folder.rows(), folder.skipped()
    if skipped and not rows and len(skipped) == record["data"]["samples"]:
        raise EvalError(
            f"{out}: all {len(skipped)} samples were skipped, the first one since "
            f"{skipped[0]['reason']}. Put it right, delete {folder.skip_list}, and run it again"
        )
    if not rows:
        raise EvalError(f"{folder.answers} holds no answers yet: run it again to go on")
    metrics: dict[str, Any] = {
        "answered": len(rows),
        "skipped": len(skipped),
        "samples": record["data"]["samples"],
    }
    for task, split in sorted({(row["task"], row["split"]) for row in rows}):
        part = [row for row in rows if (row["task"], row["split"]) == (task, split)]
        metrics.setdefault(task, {})[split] = _scored(out, record, task, part)
    folder.write_metrics(metrics)
    return metrics


def _scored(
    out: Path, record: Mapping[str, Any], task: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    if task in tasks.TASKS:
        return tasks.TASKS[task].score(rows, out, record["settings"][task])
    return _chair(out, record, rows) if task == "chair" else _pope(record, rows)


def _chair(
    out: Path, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """CHAIR of one split, and the share of captions that ended before the token limit."""
    captions = [(int(row["image_id"]), str(row["answer"])) for row in rows]
    truth = {int(row["image_id"]): row["truth"] for row in rows}
    ended = sum(bool(row["ended"]) for row in rows) / len(rows)
    found = chair.score(captions, truth, vocabulary(out, record))
    found["flags"] += echo.flags([(str(row["answer"]), str(row.get("prompt", ""))) for row in rows])
    return {**found, "ended_share": ended}


def vocabulary(out: Path, record: Mapping[str, Any]) -> Vocabulary:
    """The object words that the run in a folder is scored with; a list of one's own lies there."""
    task = record["settings"]["chair"]
    synonyms = None if task["synonyms"] is None else out / Path(task["synonyms"]).name
    return Vocabulary.load(synonyms, task["rules"])


def _pope(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """POPE of one split by strategy; questions about one image stand or fall together."""
    return {
        strategy: pope.score(*given, parser=pope_parser(record))
        for strategy, given in pope.by_strategy(rows).items()
    }


def pope_parser(record: Mapping[str, Any]) -> str:
    """The name of the rule by which the answers of a run are read."""
    return str(record["settings"]["pope"].get("parser", "official"))
