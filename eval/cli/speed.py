"""python -m eval speed: what the methods cost beside the stock model."""

import argparse
import json
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
    parser.add_argument(
        "--from", type=Path, dest="record", metavar="JSON", help="speed.json of an earlier run"
    )
    parser.add_argument(
        "--docs", action="store_true", help="write the machine's table into docs/speed.md"
    )
    parser.set_defaults(command=speed)


def speed(options: argparse.Namespace) -> None:
    """Time the methods, or read what was timed, and print the table."""
    from eval.speed import measure, table  # models of many sizes, which no other command needs
    from eval.support import pages

    if options.record:
        record = json.loads(options.record.read_text(encoding="utf-8"))
    else:
        record = measure.speed(
            options.out,
            options.shapes,
            options.methods,
            options.repeats,
            options.threads,
            options.device,
        )
    print(f"\n{table.markdown(record)}")
    if options.docs:
        pages.write("speed", f"speed-{table.place(record)}", table.summary(record))
        print(f"docs/speed.md holds the table of {record['machine']['device']}.")
    if not options.record:
        print(f"{options.out} holds speed.md and speed.json.")
