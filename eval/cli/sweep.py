"""python -m eval sweep: tune the methods on some images, report on others."""

import argparse
from pathlib import Path

from eval.cli import Commands, is_first_process
from eval.cli.run import changes
from eval.studies import sweep as study


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("sweep", help="tune the methods on some images, report others")
    parser.add_argument("config", type=Path, help="a YAML file, see configs/")
    parser.add_argument("--out", type=Path, required=True, help="an interrupted sweep is resumed")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=VALUE,VALUE", help="may be repeated"
    )
    parser.add_argument("--grid-heads", metavar="layers|heads", help="methods on in one at a time")
    parser.add_argument("--measure", help="what is tuned (default: the main one of the first task)")
    parser.add_argument("--tune-split", help="default: one half of the images of each split")
    parser.add_argument("--limit", type=int, help="only so many images a split and task")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.set_defaults(command=sweep)


def sweep(options: argparse.Namespace) -> None:
    """Run the grid, and print its table."""
    plan = study.Sweep(
        options.config,
        tuple(changes(options)),
        tuple(options.grid),
        options.grid_heads,
        options.measure,
        options.tune_split,
    )
    result = study.sweep(plan, options.out)
    if is_first_process():
        print(study.markdown(result, options.out))
