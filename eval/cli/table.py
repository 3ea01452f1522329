"""python -m eval table: runs side by side."""

import argparse
from pathlib import Path

from eval.cli import Commands
from eval.reports import export, plot


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("table", help="runs side by side")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--format", default="markdown", help=" | ".join(export.FORMATS))
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="needs the extra `plot`")
    parser.set_defaults(command=table)


def table(options: argparse.Namespace) -> None:
    """Print the table, and plot it where a file is given."""
    print(export.write(options.folders, options.format))
    if options.plot is not None:
        plot.plot(options.folders, options.plot)
