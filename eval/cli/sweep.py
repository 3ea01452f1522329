"""python -m eval sweep: tune the methods on some images, report on others."""

from pathlib import Path

from eval.cli import changes, is_first_process
from eval.cli.engine import Name, engine_of
from eval.cli.function import Command
from eval.studies import sweep as study


def sweep(
    config: Path,
    /,
    out: Path,
    grid: list[str] | None = None,
    grid_heads: str | None = None,
    measure: str | None = None,
    tune_split: str | None = None,
    limit: int | None = None,
    set_: list[str] | None = None,
    engine: Name = "local",
    workers: int | None = None,
) -> None:
    """Tune the methods on some images, report others.

    config: a YAML file, see configs/
    out: an interrupted sweep is resumed
    grid (KEY=VALUE,VALUE): may be repeated
    grid_heads (layers|heads): methods on in one at a time
    measure: what is tuned (default: the main one of the first task)
    tune_split: default: one half of the images of each split
    limit: only so many images a split and task
    set_ (KEY=VALUE): for example gift.alpha=4
    engine: where models are loaded
    workers: of ray (default: one per accelerator, or 1)
    """
    changed, grids = tuple(changes(set_, limit)), tuple(grid or ())
    plan = study.Sweep(config, changed, grids, grid_heads, measure, tune_split)
    result = study.sweep(plan, out, engine=engine_of(engine, workers))
    if is_first_process():
        print(study.markdown(result, out))


add = Command(sweep, prints=False).add
