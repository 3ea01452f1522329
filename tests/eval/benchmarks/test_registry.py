"""The protocol: what every benchmark declares agrees with what it does."""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_args, get_type_hints

import pytest

from eval.benchmarks import registry
from eval.benchmarks.amber.nouns import READERS, Nouns
from eval.benchmarks.base import Benchmark, Measure
from eval.benchmarks.chair.alarm import LIMITS
from eval.benchmarks.coco import RULES, Rules
from eval.benchmarks.parsers import (
    AMBER_PARSERS,
    HALLUSIONBENCH_PARSERS,
    MME_PARSERS,
    PARSERS,
    ParserName,
)
from eval.benchmarks.registry import BENCHMARKS, TASKS
from eval.errors import EvalError


def test_the_members() -> None:
    assert [*TASKS] == ["chair", "pope", "amber", "mme", "mmvp", "hallusionbench"]
    assert [*BENCHMARKS][6:] == ["object-halbench", "mmhal", "llava-bench"], "from files only"
    assert registry.DEFAULT == ("chair", "pope")


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (ParserName, PARSERS),
        (ParserName, AMBER_PARSERS),
        (ParserName, MME_PARSERS),
        (ParserName, HALLUSIONBENCH_PARSERS),
        (Rules, RULES),
        (Nouns, READERS),
    ],
)
def test_the_names_in_types_are_those_that_are_known(
    names: object, known: dict[str, object]
) -> None:
    assert {*get_args(names)} == {*known}


@pytest.mark.parametrize("benchmark", TASKS.values(), ids=TASKS)
def test_what_is_named_is_declared(benchmark: Benchmark) -> None:
    keys = {*benchmark.plot, benchmark.main or next(iter(benchmark.measures))}
    assert keys <= {*benchmark.measures}
    assert {*benchmark.before} <= {*get_type_hints(benchmark.settings)}
    free = [measure for measure in benchmark.measures.values() if measure.free]
    assert all(measure.direction < 0 for measure in free)
    assert not free or any(measure.cost for measure in benchmark.measures.values())
    assert benchmark.settings().max_new_tokens > 0


def test_chair_never_stands_alone() -> None:
    """Whatever lowers it for free is a row beside it, and what the alarm is about is one too."""
    chair = TASKS["chair"].measures
    assert {key for key, measure in chair.items() if measure.free} == {"chair_s", "chair_i"}
    paid = {key for key, measure in chair.items() if measure.cost}
    assert paid == {"recall", "mean_tokens", "looping_share", "no_object_share"}
    assert {key for key, *_ in LIMITS.values()} <= {*chair}


def test_shares_are_shown_in_percent_and_all_else_as_it_is() -> None:
    assert (Measure("recall %").times, Measure("length", "words").times) == (100, 1)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_argument_of_a_scorer_is_documented(name: str) -> None:
    function = BENCHMARKS[name].score_files
    assert function is not None
    lines = str(inspect.getdoc(function)).splitlines()
    for argument, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(parameter.default):  # several options, described in its class
            lines = [*lines, f"{argument}: "]
        assert any(line.startswith((f"{argument}: ", f"{argument} (")) for line in lines), argument


def test_benchmarks_are_in_the_order_of_the_registry() -> None:
    assert [*registry.requested(["mme", "pope", "chair"])] == ["chair", "pope", "mme"]
    with pytest.raises(EvalError, match="unknown task: chiar; did you mean chair"):
        registry.requested(["chiar"])


@pytest.mark.parametrize("function", ["samples", "tallies"])
def test_a_benchmark_that_a_run_cannot_use_is_refused_before_anything_runs(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(TASKS["mme"]), function, getattr(Benchmark, function))
    expected = f"task eval.benchmarks.mme:Mme: defines no {function}, which a run needs"
    with pytest.raises(EvalError, match=expected):
        registry.imported("eval.benchmarks.mme:Mme")
    with pytest.raises(EvalError, match=f"mme defines no {function}"):
        getattr(TASKS["mme"], function)(None, None, *([None] * (function == "tallies")))
