"""Run a configuration into its folder, and score a folder; generating and scoring are apart.

Scoring reads the folder alone and always gives the same bytes of metrics.json for the same answers.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import gather_object
from tqdm import tqdm

from eval.benchmarks import registry
from eval.errors import EvalError
from eval.runs import batches, generate, splitting, workers
from eval.runs import samples as dataset
from eval.runs.batches import Batch
from eval.runs.config import Config, recorded
from eval.runs.folder import RunFolder
from eval.runs.provenance import environment
from eval.runs.samples import Sample, notice
from eval.runs.workers import Engine, Load
from vlm_patch.models.chat import GREEDY


def run(
    config: Config,
    out: Path,
    scenes: Path | None = None,
    load: Load = generate.load_model,
    samples: Sequence[Sample] | None = None,
    engine: Engine = workers.answer_here,
) -> dict[str, Any]:
    """Generate the answers that the folder `out` still lacks, and score it; returns the metrics.

    Of the processes that a launcher started each answers its share, and the main one scores.
    `scenes` is where pocket scenes are drawn (None: in `out`). `load` gives model and processor; it
    is called only if there is something to generate. `samples` spares reading the data again where
    it was read by the same settings.
    """
    folder, main = RunFolder(out), splitting.processes().is_main_process
    if samples is None:
        samples = dataset.samples(config, scenes or out / "scenes")
    with folder.locked() if main else nullcontext():
        if main:
            record = folder.open(describe(config, samples), config.scoring_files())
            _check_environment(out, record, environment(config))
            folder.merge(samples)
        splitting.processes().wait_for_everyone()
        _answer(folder, config, samples, load, engine)
        splitting.processes().wait_for_everyone()
        if main:
            folder.merge(samples)
            _check_complete(folder, samples)
            score(out)
        splitting.processes().wait_for_everyone()
    return folder.read_metrics()


def _answer(
    folder: RunFolder, config: Config, samples: Sequence[Sample], load: Load, engine: Engine
) -> None:
    """Answer this process's share of what the folder lacks.

    A batch that is there in part is requested again as a whole, so that its padding is the same;
    what is there is kept.
    """
    launch, settled = splitting.processes(), folder.settled()
    todo = [
        batch
        for batch in batches.divide(samples, config)
        if not settled.issuperset(sample.key for sample in batch.samples)
    ]
    if not todo:
        return
    if launch.is_main_process:
        folder.metrics.unlink(missing_ok=True)
        if settled:
            done = f"{len(settled)} of {len(samples)} samples are answered"
            notice(f"{folder.path}: {done}, resuming")
    rank = None if launch.num_processes == 1 else launch.process_index
    mine = splitting.share(todo, config)
    provenance: workers.Provenance = {}
    with _bar(folder, mine, rank) as bar, closing(engine(mine, config, load)) as answered:
        for results, made in answered:
            if made != provenance and launch.is_main_process:
                folder.remember(made)
            provenance = made
            if launch.is_main_process or config.tp_plan is None:
                folder.write([it for it in results if it[0].key not in settled], rank)
            bar.update(len(results))
    everyone = gather_object([provenance])
    if launch.is_main_process:
        for made in everyone:
            folder.remember(made)


def _bar(folder: RunFolder, mine: Sequence[Batch], rank: int | None) -> "tqdm[NoReturn]":
    """The progress of this process's share; only the main process shows it."""
    launch, name = splitting.processes(), folder.path.name
    return tqdm(
        desc=name if rank is None else f"{name}, process {rank + 1} of {launch.num_processes}",
        total=sum(len(batch.samples) for batch in mine),
        unit=" answers",
        disable=not launch.is_main_process,
    )


def _check_complete(folder: RunFolder, samples: Sequence[Sample]) -> None:
    settled = folder.settled()
    if missing := [sample for sample in samples if sample.key not in settled]:
        raise EvalError(
            f"{folder.path} lacks {len(missing)} of {len(samples)} answers though every process "
            f"is done: it must be on a file system that the machines of a launch share"
        )


def _check_environment(out: Path, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say so where the answers that are there were made by other versions.

    The device is left out: workers on other machines have others.
    """
    before = (record["environments"] or [now])[-1]
    changed = [f"{key} {before.get(key)}" for key in now if before.get(key) != now[key]]
    if changed := [it for it in changed if not it.startswith("device ")]:
        notice(f"{out} has answers of {', '.join(changed)}: delete it to make them anew")


def describe(config: Config, samples: Sequence[Sample]) -> dict[str, Any]:
    """The record of a run at its start: all that is needed to repeat it."""
    return {
        "settings": config.settings(),
        "data": dataset.describe(samples),
        "decoding": dict(GREEDY),
        "environments": [],
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
        raise EvalError(f"{folder.answers} holds no answers yet: run it again to resume")
    metrics: dict[str, Any] = {
        "answered": len(rows),
        "skipped": len(skipped),
        "samples": record["data"]["samples"],
    }
    benchmarks = registry.requested(record["settings"]["tasks"])
    for name, split in sorted({(row["task"], row["split"]) for row in rows}):
        part = [row for row in rows if (row["task"], row["split"]) == (name, split)]
        scores = benchmarks[name].score(part, recorded(record, benchmarks[name]), out)
        metrics.setdefault(name, {})[split] = scores
    folder.write_metrics(metrics)
    return metrics
