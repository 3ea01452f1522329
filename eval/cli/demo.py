"""python -m eval demo: the pocket model as it is, with each method, and with all of them."""

from pathlib import Path

from eval.cli.function import Command
from eval.cli.options import HERE, Engines
from eval.studies import demo as study

OUT = Path("runs/demo")


def demo(
    out: Path = OUT,
    all_: bool = False,
    device: str | None = None,
    engines: Engines = HERE,
    docs: bool = False,
) -> None:
    """Pocket model: baseline, VAR, GIFT, VHR and all three.

    out: folder of the runs (default: runs/demo)
    all_: print every row of the table
    device: cpu, cuda ... (default: the accelerator if there is one)
    docs: write the table into docs/results.md
    """
    study.demo(out, device, all_, engines.open(), docs)


add = Command(demo, prints=False).add
