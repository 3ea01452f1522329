"""All benchmarks by name: those of this project, one line each, and a user's own by import path."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from eval.benchmarks.amber.benchmark import Amber
from eval.benchmarks.base import Benchmark, lacks
from eval.benchmarks.chair.benchmark import Chair
from eval.benchmarks.hallusionbench.benchmark import HallusionBench
from eval.benchmarks.llava_bench import LlavaBench
from eval.benchmarks.mme import Mme
from eval.benchmarks.mmhal import MmHal
from eval.benchmarks.mmvp import Mmvp
from eval.benchmarks.object_halbench import ObjectHalBench
from eval.benchmarks.pope.benchmark import Pope
from eval.errors import EvalError
from eval.schema import unknown

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Chair(),
        Pope(),
        Amber(),
        Mme(),
        Mmvp(),
        HallusionBench(),
        ObjectHalBench(),
        MmHal(),
        LlavaBench(),
    )
}
TASKS: Mapping[str, Benchmark] = {
    name: benchmark for name, benchmark in BENCHMARKS.items() if benchmark.settings is not None
}
"""Those that a run can ask."""
DEFAULT = tuple(TASKS)[:2]
"""What a run asks that names no tasks."""


def known(tasks: Iterable[str] = ()) -> dict[str, Benchmark]:
    """The benchmarks that a run can ask, and those that `tasks` names by import path."""
    own = [imported(task) for task in tasks if ":" in task]
    for benchmark in own:
        if benchmark.name in TASKS:
            raise EvalError(f"the name {benchmark.name} is taken: give your benchmark another")
    return {**TASKS, **{benchmark.name: benchmark for benchmark in own}}


def named(task: str) -> Benchmark:
    """The benchmark behind one of the `tasks` of a configuration."""
    if ":" in task:
        return imported(task)
    if task not in TASKS:
        raise EvalError(unknown("task", task, TASKS))
    return TASKS[task]


def requested(tasks: Iterable[str]) -> dict[str, Benchmark]:
    """The benchmarks behind `tasks` by name, in the order of the registry, a user's own last."""
    tasks = list(dict.fromkeys(tasks))
    names = {named(task).name for task in tasks}
    return {name: benchmark for name, benchmark in known(tasks).items() if name in names}


def imported(path: str) -> Benchmark:
    """The benchmark at an import path, as in `my_pkg.my_file:MyBenchmark`."""
    module, _, name = path.partition(":")
    try:
        kind: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise EvalError(
            f"task {path}: {error}. Expected my_pkg.my_file:MyBenchmark, which Python can import "
            f"from the folder where the command is given"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Benchmark)):
        raise EvalError(f"task {path}: expected a subclass of Benchmark, found {kind!r}")
    fields = getattr(kind.settings, "__dataclass_fields__", {})
    if not hasattr(kind, "name") or "max_new_tokens" not in fields:
        raise EvalError(
            f"task {path}: expected a name, and as settings a dataclass with max_new_tokens, as in "
            f"docs/add-a-benchmark.md"
        )
    for function in ("samples", "tallies"):
        if getattr(kind, function) is getattr(Benchmark, function):
            raise lacks(f"task {path}:", function)
    return kind()
