"""python -m eval run: generate responses by a configuration and score them."""

import argparse
import functools
from pathlib import Path

from eval.cli import Commands, is_first_process
from eval.errors import EvalError
from eval.reports import table
from eval.runs import config, ray_engine, runner
from eval.runs.workers import Engine, answer_here


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("run", help="generate answers by a configuration and score them")
    parser.add_argument("config", type=Path, help="a YAML file, see configs/")
    parser.add_argument(
        "--out", type=Path, required=True, help="the run folder; an interrupted run is resumed"
    )
    parser.add_argument("--limit", type=int, help="only so many images a split and task")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example gift.alpha=4"
    )
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="where models are loaded"
    )
    parser.add_argument("--workers", type=int, help="of ray (default: one per accelerator, or 1)")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> None:
    """Run, score, and print the table."""
    settings = config.load(options.config, changes(options))
    runner.run(settings, options.out, engine=_engine(options))
    if is_first_process():
        print(table.markdown([options.out]))


def _engine(options: argparse.Namespace) -> Engine:
    if options.engine == "ray":
        return functools.partial(ray_engine.answer, workers=options.workers)
    if options.workers is not None:
        raise EvalError(
            f"--workers {options.workers} needs --engine ray; for as many processes without Ray: "
            f"accelerate launch --num_processes {options.workers} -m eval run ..."
        )
    return answer_here


def changes(options: argparse.Namespace) -> list[str]:
    """The settings that the command line changes, as KEY=VALUE."""
    limit = [] if options.limit is None else [f"limit={options.limit}"]
    return [*options.set, *limit]
