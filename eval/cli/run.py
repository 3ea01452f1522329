"""python -m eval run: generate responses by a configuration and score them."""

from pathlib import Path

from eval.cli import is_first_process
from eval.cli.function import Command
from eval.cli.options import HERE, UNCHANGED, Changes, Engines
from eval.reports import table
from eval.runs import runner
from eval.runs.config import load


def run(config: Path, /, out: Path, changes: Changes = UNCHANGED, engines: Engines = HERE) -> None:
    """Generate answers by a configuration and score them.

    config: a YAML file, see configs/
    out: the run folder; an interrupted run is resumed
    """
    settings = load(config, changes.settings)
    runner.run(settings, out, engine=engines.open())
    if is_first_process():
        print(table.markdown([out]))


add = Command(run, prints=False).add
