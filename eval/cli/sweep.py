"""python -m eval sweep: tune the methods on some images, report on others."""

from pathlib import Path

from eval.cli import is_first_process
from eval.cli.function import Command
from eval.cli.options import HERE, UNCHANGED, Changes, Engines
from eval.studies import sweep as study


def sweep(
    config: Path,
    /,
    out: Path,
    grid: list[str] | None = None,
    grid_heads: str | None = None,
    measure: str | None = None,
    tune_split: str | None = None,
    changes: Changes = UNCHANGED,
    engines: Engines = HERE,
) -> None:
    """Tune the methods on some images, report others.

    config: a YAML file, see configs/
    out: an interrupted sweep is resumed
    grid (KEY=VALUE,VALUE): may be repeated
    grid_heads (layers|heads): methods on in one at a time
    measure: what is tuned (default: the main one of the first task)
    tune_split: default: one half of the images of each split
    """
    changed, grids = tuple(changes.settings), tuple(grid or ())
    plan = study.Sweep(config, changed, grids, grid_heads, measure, tune_split)
    result = study.sweep(plan, out, engine=engines.open())
    if is_first_process():
        print(study.markdown(result, out))


add = Command(sweep, prints=False).add
