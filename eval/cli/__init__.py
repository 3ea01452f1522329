"""The commands of the command line, one file each.

A file holds the function of its command, whose arguments are its options (`eval.cli.function`), and
`add`, which adds it to the command line; the work itself is done by the package that answers the
question.
"""

import argparse
import os
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command adds its own parser to."""


def is_first_process() -> bool:
    """Whether this process prints: of those that a launcher started, only the first does."""
    return os.environ.get("RANK", "0") == "0"
