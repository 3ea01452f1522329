"""python -m eval demo: the pocket model as it is, with each method, and with all of them."""

from pathlib import Path

from eval.cli.engine import Name, engine_of
from eval.cli.function import Command
from eval.studies import demo as study

OUT = Path("runs/demo")


def demo(
    out: Path = OUT,
    all_: bool = False,
    device: str | None = None,
    engine: Name = "local",
    workers: int | None = None,
    docs: bool = False,
) -> None:
    """Pocket model: baseline, VAR, GIFT, VHR and all three.

    out: folder of the runs (default: runs/demo)
    all_: print every row of the table
    device: cpu, cuda ... (default: the accelerator if there is one)
    engine: where models are loaded
    workers: of ray (default: one per accelerator, or 1)
    docs: write the table into docs/results.md
    """
    study.demo(out, device, all_, engine_of(engine, workers), docs)


add = Command(demo, prints=False).add
