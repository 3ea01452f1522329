"""python -m eval compare: two runs on the same images, in pairs."""

import argparse
import json
from pathlib import Path

from eval.cli import Commands
from eval.reports import compare as report


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("compare", help="two runs on the same images, in pairs")
    parser.add_argument("before", type=Path, metavar="RUN_A")
    parser.add_argument("after", type=Path, metavar="RUN_B")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=compare)


def compare(options: argparse.Namespace) -> None:
    """Print the comparison as a table or as JSON."""
    result = report.compare(options.before, options.after)
    print(json.dumps(result, indent=2) if options.json else report.markdown(result))
