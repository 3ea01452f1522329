"""python -m eval speed: what the methods cost beside the stock model."""

import argparse
from pathlib import Path

from eval.cli import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("speed", help="What the methods cost beside the stock model")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument(
        "--shapes", help="names with commas between, or all (default: the quick ones)"
    )
    parser.add_argument("--methods", help="of var,gift,vhr,all, or import paths (default: those)")
    parser.add_argument("--repeats", type=int, default=25, help="pairs at most (default: 25)")
    parser.add_argument("--device", help="cpu or cuda (default: the accelerator if there is one)")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    parser.set_defaults(command=speed)


def speed(options: argparse.Namespace) -> None:
    """Time the methods, and print the table."""
    from eval.speed import measure  # models of many sizes, which no other command needs

    measure.speed(
        options.out,
        options.shapes,
        options.methods,
        options.repeats,
        options.threads,
        options.device,
    )
