"""python -m eval data: fetch a benchmark's files."""

import argparse
from pathlib import Path

from eval.benchmarks import download
from eval.cli import Commands
from eval.errors import EvalError


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("data", help="Fetch a benchmark's files")
    parser.add_argument("name", help=", ".join(download.sources()), metavar="NAME")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where it goes")
    parser.set_defaults(command=data)


def data(options: argparse.Namespace) -> None:
    """Fetch what the folder lacks, and print a line per file and what is left to do by hand."""
    sources = download.sources()
    if options.name not in sources:
        raise EvalError(f"data {options.name}: expected one of {', '.join(sources)}.")
    source = sources[options.name]
    print(f"{options.name}: {source.about}")
    print("\n".join(download.fetch(source, options.to)))
    if source.by_hand:
        print(f"by hand: {source.by_hand}")
