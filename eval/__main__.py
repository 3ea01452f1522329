"""python -m eval COMMAND: runs, scores, tables, and what is measured of the library itself."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from eval.cli import (
    compare,
    data,
    demo,
    frontier,
    models,
    modes,
    own,
    run,
    score,
    speed,
    sweep,
    table,
)
from eval.errors import EvalError
from vlm_patch import PatchError, UnsupportedModelError

COMMANDS = (run, score, data, own, compare, table, frontier, sweep, demo, models, speed, modes)
ROOM = ": what was written is kept; make room and give the same command again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 after an error (printed on stderr), 130 if stopped."""
    options = parser().parse_args(score.expanded(sys.argv[1:] if arguments is None else arguments))
    try:
        options.command(options)
    except (EvalError, UnsupportedModelError, PatchError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"error: {error}{ROOM if full else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command resumes where this one ended", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
