"""python -m eval frontier: what is said against what of it is wrong, beside trivial baselines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eval.cli import Commands
from eval.studies import frontier as study
from eval.studies import frontier_picture, frontier_table


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("frontier", help="runs beside trivial baselines, with tests")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of frontier.md and frontier.png (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=frontier)


def frontier(options: argparse.Namespace) -> None:
    """Print the tables, write them, and draw the picture."""
    result = study.frontier(options.folders)
    text = frontier_table.markdown(result)
    print(json.dumps(result, indent=2) if options.json else text, end="")
    out = options.out or Path()
    out.mkdir(parents=True, exist_ok=True)
    (out / "frontier.md").write_text(text, encoding="utf-8")
    frontier_picture.draw(result, out / "frontier.png")
