"""python -m eval models: which model families are supported, measured."""

from pathlib import Path

from eval.cli.function import Command


def models(
    types: str | None = None, json: bool = False, out: Path | None = None, docs: bool = False
) -> None:
    """Which model families are supported, measured.

    types: names with commas between (default: every one)
    json: print JSON
    out: write it to this file too
    docs: write it into docs/models.md
    """
    from eval.support import families  # builds models, which no other command needs

    families.models(types, json, out, docs)


add = Command(models, prints=False).add
