"""Every benchmark's metrics.json, table and comparison, as recorded before the benchmark protocol.

The responses are made up by a rule, so no model decides what stands here.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.reports import compare, export, table
from eval.runs import generate, runner
from tests.eval.benchmarks.test_tasks import ALL, folder, sections
from tests.eval.conftest import Settings

GOLDEN = Path(__file__).parents[2] / "data" / "golden_benchmarks.json"
SAID = (
    "A dog and a cup on a table, and a person with a cat beside the car.",
    "Yes, there is.",
    "No.",
    "(a) Open",
    "Maybe",
    "A dog in the sky. A dog in the sky. A dog in the sky. A dog in the sky. A dog in the sky.",
)

__all__ = ["folder"]


def responses(seed: str) -> Any:
    def ask(_model: Any, _processor: Any, batch: Sequence[Any], _limit: int) -> list[Any]:
        picks = [hashlib.sha256("/".join((seed, *s.key)).encode()).digest()[0] for s in batch]
        return [generate.Response(SAID[n % len(SAID)], 5, n % 7 > 0) for n in picks]

    return ask


def test_scores_tables_and_comparisons_stay(
    settings: Settings, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    given = sections(folder, "chair", "pope", *ALL)
    small = {"images": 4, "per_image": 1, "max_new_tokens": 2}
    given |= {"chair": {"images": 8, "max_new_tokens": 9}, "pope": small}
    for run in runs:
        monkeypatch.setattr(generate, "ask", responses(run.name))
        runner.run(settings(**given), run, load=lambda _: (None, None))
    found = {
        "metrics": [
            hashlib.sha256((run / "metrics.json").read_bytes()).hexdigest() for run in runs
        ],
        "table": table.markdown(runs).partition("\n\n")[2],
        "csv": export.table_csv(runs),
        "compare": compare.markdown(compare.compare(*runs)),
        "compare_json": {
            key: value
            for key, value in compare.compare(*runs).items()
            if key not in ("before", "after")
        },
    }
    recorded = json.loads(GOLDEN.read_text())
    # since then the rows and notes of a table follow the benchmarks' own order
    assert _sorted(found.pop("table")) == _sorted(recorded.pop("table"))
    assert _sorted(found.pop("csv")) == _sorted(recorded.pop("csv"))
    assert found == recorded


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sorted(text: str) -> list[str]:
    return sorted(text.splitlines())
