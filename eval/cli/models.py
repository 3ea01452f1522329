"""python -m eval models: which model families are supported, measured."""

import argparse
from pathlib import Path

from eval.cli import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("models", help="which model families are supported, measured")
    parser.add_argument("--types", help="names with commas between (default: every one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="write it to this file too")
    parser.add_argument("--docs", action="store_true", help="write it into docs/models.md")
    parser.set_defaults(command=models)


def models(options: argparse.Namespace) -> None:
    """Build a tiny model of every type, and check it."""
    from eval.support import families  # builds models, which no other command needs

    families.models(options.types, options.json, options.out, options.docs)
