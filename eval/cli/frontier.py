"""python -m eval frontier: what is said against what of it is wrong, beside trivial baselines."""

import json
from pathlib import Path

from eval.cli.function import Command
from eval.studies import frontier as study
from eval.studies import frontier_picture, frontier_table


def frontier(folders: list[Path], /, out: Path | None = None, json_: bool = False) -> None:
    """Runs beside trivial baselines, with tests.

    folders (RUN): of runs
    out (DIR): of frontier.md and frontier.png (default: here)
    json_: print one JSON object
    """
    result = study.frontier(folders)
    text = frontier_table.markdown(result)
    print(json.dumps(result, indent=2) if json_ else text, end="")
    out = out or Path()
    out.mkdir(parents=True, exist_ok=True)
    (out / "frontier.md").write_text(text, encoding="utf-8")
    frontier_picture.draw(result, out / "frontier.png")


add = Command(frontier, prints=False).add
