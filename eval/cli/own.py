"""The commands that benchmarks bring along beside scores, such as a maker of questions."""

from eval.benchmarks.registry import BENCHMARKS
from eval.cli import Commands
from eval.cli.function import Command


def add(commands: Commands) -> None:
    """Add every such command and its options."""
    for benchmark in BENCHMARKS.values():
        for name, function in benchmark.commands.items():
            Command(function, prints=False).add(commands, name)
