"""python -m eval table: runs side by side."""

from pathlib import Path

from eval.cli.function import Command
from eval.reports import export
from eval.reports.plot import plot as draw


def table(folders: list[Path], /, format_: str = "markdown", plot: Path | None = None) -> None:
    """Runs side by side.

    folders (RUN): folders of runs
    format_ (FORMAT): markdown | csv | latex
    plot (FILE.png): picture of the table, needs the extra `plot`
    """
    print(export.write(folders, format_))
    if plot is not None:
        draw(folders, plot)


add = Command(table, prints=False).add
