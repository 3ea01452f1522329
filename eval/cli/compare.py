"""python -m eval compare: two runs on the same images, in pairs."""

import json
from pathlib import Path

from eval.cli.function import Command
from eval.reports import compare as report


def compare(before: Path, after: Path, /, json_: bool = False) -> None:
    """Two runs on the same images, in pairs.

    before (RUN_A): folder of a run
    after (RUN_B): folder of another
    json_: print one JSON object
    """
    result = report.compare(before, after)
    print(json.dumps(result, indent=2) if json_ else report.markdown(result))


add = Command(compare, prints=False).add
