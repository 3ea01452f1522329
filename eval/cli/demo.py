"""python -m eval demo: the pocket model as it is, with each method, and with all of them."""

import argparse
from pathlib import Path

from eval.cli import Commands
from eval.studies import demo as study


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "demo", help="pocket model: baseline, VAR, GIFT, VHR and all three"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--all", action="store_true", help="print every row of the table")
    parser.add_argument("--device", help="cpu, cuda ... (default: the accelerator if there is one)")
    parser.set_defaults(command=demo)


def demo(options: argparse.Namespace) -> None:
    """Run all of it; the study prints the table."""
    study.demo(options.out, options.device, options.all)
