"""python -m eval modes: every way of generating, against the slow reference."""

import argparse
from pathlib import Path

from eval.cli import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "modes", help="every way of generating, against the slow reference"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there too")
    parser.add_argument("--docs", action="store_true", help="write it into docs/generation.md")
    parser.set_defaults(command=modes)


def modes(options: argparse.Namespace) -> None:
    """Check every way with every method, and print the table."""
    from eval.support import modes as support  # runs models, which no other command needs

    support.modes(options.json, options.out, options.docs)
