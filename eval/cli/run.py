"""python -m eval run: generate responses by a configuration and score them."""

from pathlib import Path

from eval.cli import changes, is_first_process
from eval.cli.engine import Name, engine_of
from eval.cli.function import Command
from eval.reports import table
from eval.runs import runner
from eval.runs.config import load


def run(
    config: Path,
    /,
    out: Path,
    limit: int | None = None,
    set_: list[str] | None = None,
    engine: Name = "local",
    workers: int | None = None,
) -> None:
    """Generate answers by a configuration and score them.

    config: a YAML file, see configs/
    out: the run folder; an interrupted run is resumed
    limit: only so many images a split and task
    set_ (KEY=VALUE): for example gift.alpha=4
    engine: where models are loaded
    workers: of ray (default: one per accelerator, or 1)
    """
    settings = load(config, changes(set_, limit))
    runner.run(settings, out, engine=engine_of(engine, workers))
    if is_first_process():
        print(table.markdown([out]))


add = Command(run, prints=False).add
