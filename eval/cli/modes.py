"""python -m eval modes: every way of generating, against the slow reference."""

from pathlib import Path

from eval.cli.function import Command


def modes(json: bool = False, out: Path | None = None, docs: bool = False) -> None:
    """Every way of generating, against the slow reference.

    json: print one JSON list
    out (FILE): write it there too
    docs: write it into docs/generation.md
    """
    from eval.support import modes as support  # runs models, which no other command needs

    support.modes(json, out, docs)


add = Command(modes, prints=False).add
