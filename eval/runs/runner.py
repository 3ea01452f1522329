"""Run a configuration into its folder, and score a folder; generating and scoring are apart.

Scoring reads the folder alone and always gives the same bytes of metrics.json for the same answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks import registry
from eval.runs import crew, generate, workers
from eval.runs import samples as dataset
from eval.runs.workers import Desk, Load
from eval.runs.config import Config, recorded
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
        samples = dataset.samples(config, scenes or out / "scenes")
    record = folder.open(describe(config, samples), config.scoring_files())
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
    asked = registry.asked(record["settings"]["tasks"])
    for name, split in sorted({(row["task"], row["split"]) for row in rows}):
        part = [row for row in rows if (row["task"], row["split"]) == (name, split)]
        found = asked[name].score(part, recorded(record, asked[name]), out)
        metrics.setdefault(name, {})[split] = found
    folder.write_metrics(metrics)
    return metrics
