"""python -m eval speed: what the methods cost, next to the stock model and to release-style code.

Two sides that are compared run in one process in turn, A B A B; what counts is the median of the
ratios of neighbours.
"""

from __future__ import annotations

import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from tqdm import tqdm

from eval.errors import EvalError
from eval.runs.generate import best_device
from eval.speed import table as speed_table
from eval.speed.clock import Budget
from eval.speed.compiled import Compiled
from eval.speed.machine import machine
from eval.speed.memory import peaks
from eval.speed.models import Loaded
from eval.speed.shapes import METHODS, SHAPES, Shape, chosen
from eval.speed.sides import Side, check_acting, sides
from vlm_patch.methods.registry import PATH, find

COARSE = ("again", "eager", "release")
"""Kinds whose ratios are far from 1, and the stock model next to itself: they run in every third
round only, several of them next to one run of the stock model."""
IDLE_STEPS, IDLE_PAIRS = 8, 16
"""Every head off costs a hundredth of a step: it takes short runs, and 16 times as many pairs."""
KINDS = ("again", "eager", "release", "text only")
COUNTED = ("memory", "launches", "waits")
"""Phases whose figures do not scatter."""
KERNEL = "kernel"
"""In a warning: it says that plain torch takes a kernel's place, which the table must say too."""
CARD_SECONDS = 215.0
"""For all that is measured on a card by default, so that the command takes four minutes."""


@dataclass(frozen=True)
class Row:
    """One side of one phase of a shape.

    values, stock: seconds of the pairs, in order; megabytes where the phase is "memory", counts
    where it is "launches" or "waits". on: the layers, in words. change: the largest change of a
    logit. failed: why there are no values.
    """

    shape: str
    phase: str
    batch: int
    layers: int
    kind: str
    method: str
    on: str
    values: list[float]
    stock: list[float]
    change: float | None = None
    failed: str = ""

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.values, self.stock, strict=True)
        return [own / stock for own, stock in pairs] if all(self.stock) else []

    def as_json(self) -> dict[str, Any]:
        shares = self.ratios
        ratio = None
        if shares:
            ratio = {"median": median(shares), "min": min(shares), "max": max(shares)}
        value = median(self.values) if self.values else None
        named = {**asdict(self), "title": SHAPES[self.shape].title}
        return {**named, "value": value, "ratio": ratio}


def interleaved(
    stock: Callable[[], float],
    others: Mapping[str, Callable[[], float]],
    rounds: int,
    seconds: float = float("inf"),
    coarse: Sequence[str] = (),
) -> dict[str, list[tuple[float, float]]]:
    """Pairs (stock, other) of what the calls return: stock, a, stock, b, stock, a, stock, b.

    At most `rounds` of each, none begun after `seconds` but the first; those in `coarse` run in
    every third round, behind one stock run for all of them.
    """
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    start = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - start > seconds:
            break
        for name, run in others.items():
            if name not in coarse:
                pairs[name].append((stock(), run()))
        rough = [name for name in others if name in coarse and number % 3 == 0]
        base = stock() if rough else 0.0
        for name in rough:
            pairs[name].append((base, others[name]()))
    return pairs


def compared_sides(
    phase: str,
    batch: int,
    methods: Sequence[str],
    layers: int,
    beside: Sequence[str] = tuple(KINDS),
) -> list[tuple[str, str]]:
    """The (kind, method) pairs that a phase compares with stock, of the kinds in `beside`.

    "again" is the stock model once more: its ratio is the noise of this machine.
    Release-style has batch 1 only. In one layer alone GIFT would read its map where it acts, which
    takes a pass more than in a model: prefill is not compared there.
    """
    if phase == "idle":
        return [("idle", "all"), *([("again", "")] if "again" in beside else [])] * (batch == 1)
    if layers == 1 and phase in ("prefill", "attention"):
        methods = [method for method in methods if method not in ("gift", "all")]
    others = ["eager"] if phase in COUNTED else ["again", "eager"]
    pairs = [("ours", method) for method in methods]
    pairs += [(kind, "") for kind in others if kind in beside]
    if batch == 1 and "release" in beside:
        pairs += [("release", method) for method in methods if method in METHODS]
    if phase == "prefill" and "vhr" in methods and "text only" in beside:
        pairs.append(("text only", ""))
    return pairs


def measure(
    name: str, methods: Sequence[str], rounds: int, device: torch.device, budget: Budget
) -> Iterator[Row]:
    """The rows of a shape, phase by phase."""
    shape = SHAPES[name]
    budget.take(shape.setup)
    if set(shape.phases) - {"memory"}:
        loaded = shape.load(device)
        for batch in shape.batches:
            yield from _timed(name, loaded, batch, methods, rounds, budget)
        del loaded
    if "memory" in shape.phases:
        budget.take(shape.phases["memory"])
        yield from _memory(name, methods, device)


def _timed(
    name: str, loaded: Loaded, batch: int, methods: Sequence[str], rounds: int, budget: Budget
) -> Iterator[Row]:
    """All phases of a shape but memory, on the same sides."""
    shape, layers = SHAPES[name], loaded.text.num_hidden_layers
    phases = {
        phase: compared_sides(phase, batch, methods, layers, shape.beside)
        for phase in shape.phases
        if phase != "memory"
    }
    pairs = list(dict.fromkeys(pair for compared in phases.values() for pair in compared))
    groups = [[pair] for pair in pairs] if shape.one_by_one else [pairs]
    prompt = shape.make_prompt(loaded, batch)
    with sides(loaded, prompt, [("stock", "")]) as (stock,):
        for group in groups:
            with sides(loaded, prompt, group) as others:
                for phase, compared in phases.items():
                    here = [side for side in others if (side.kind, side.method) in compared]
                    if here:
                        seconds = shape.phases[phase] * len(here) / len(compared)
                        yield from _phase(name, phase, stock, here, rounds, budget.take(seconds))
            for side in others:
                side.cache = None


def _phase(
    name: str, phase: str, stock: Side, others: Sequence[Side], rounds: int, seconds: float
) -> Iterator[Row]:
    """A row for each of the others; what fails says so in its row, and the rest goes on."""
    shape, failed, pairs = SHAPES[name], {}, {}
    for side in (stock, *others):
        failed[side.name] = _reason(partial(side.prepare, phase))
    calls = {side.name: _call(side, phase, shape) for side in others if not failed[side.name]}
    if not failed[stock.name]:
        coarse = [] if shape.one_by_one else [s.name for s in others if s.kind in COARSE]
        most = 1 if phase in COUNTED else IDLE_PAIRS * rounds if phase == "idle" else rounds
        run = _call(stock, phase, shape)

        def compare() -> None:
            pairs.update(interleaved(run, calls, most, seconds, coarse))

        failed[stock.name] = _reason(compare)
    for side in others:
        why = failed[side.name] or failed[stock.name]
        acts = side.kind in ("ours", "release") and not why
        change = check_acting(side, stock) if acts else None
        found = pairs.get(side.name, [])
        values, stocks = [own for _, own in found], [base for base, _ in found]
        where = side.prompt.batch, side.layers, side.kind, side.method, side.on
        yield Row(name, phase, *where, values, stocks, change, why)


def _reason(run: Callable[[], object]) -> str:
    """Why a call failed, in a line, or nothing."""
    try:
        run()
    except EvalError:
        raise
    except Exception as error:  # whatever a compiler or a driver raises
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return ""


def _call(side: Side, phase: str, shape: Shape) -> Callable[[], float]:
    return {
        "prefill": side.prefill,
        "decode": lambda: side.decode(shape.steps),
        "compiled": lambda: cast(Compiled, side.compiled).decode(shape.steps),
        "idle": lambda: side.decode(IDLE_STEPS),
        "attention": side.attention,
        "generate": lambda: side.generate(shape.tokens),
        "answers": lambda: side.generate(2),
        "launches": side.launches,
        "waits": side.waits,
    }[phase]


def _memory(name: str, methods: Sequence[str], device: torch.device) -> Iterator[Row]:
    beside = SHAPES[name].beside
    pairs = [("stock", ""), *compared_sides("memory", 1, methods, 0, beside)]
    megabytes = peaks(name, pairs, device, torch.get_num_threads())
    stock = next(megabytes)
    for (kind, method), own in zip(pairs[1:], megabytes, strict=True):
        yield Row(name, "memory", 1, 0, kind, method, "", [own], [stock])


def speed(
    out: Path,
    shapes: str | None = None,
    methods: str | None = None,
    rounds: int = 25,
    threads: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """The numbers behind the table; they and the table are written to `out` after every shape."""
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device or best_device())
    if where.type == "cuda" and not torch.cuda.is_available():
        raise EvalError("--device cuda: torch sees no CUDA device on this machine")
    names, acting_methods = chosen(shapes, where), _methods(methods)
    record: dict[str, Any] = {"machine": machine(where), "rounds": rounds, "rows": []}
    record |= {"failed": {}, "warned": {}}
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    limited = where.type == "cuda" and shapes is None
    end = start + CARD_SECONDS if limited else float("inf")
    budget = Budget(sum(SHAPES[name].planned for name in names), end)
    for name in tqdm(names, desc="speed", unit=" shapes"):

        def add(name: str = name) -> None:
            for row in measure(name, acting_methods, rounds, where, budget):
                record["rows"].append(row.as_json())

        with warnings.catch_warnings(record=True) as heard:
            if why := _reason(add):
                record["failed"][name] = why
        record["warned"] |= {text: None for w in heard if KERNEL in (text := str(w.message))}
        record["minutes"] = (time.perf_counter() - start) / 60
        text = json.dumps(record, indent=1)
        (out / "speed.json").write_text(f"{text}\n", encoding="utf-8")
        (out / "speed.md").write_text(speed_table.markdown(record), encoding="utf-8")
    return record


def _methods(names: str | None) -> list[str]:
    chosen_methods = list(METHODS) if names is None else [n.strip() for n in names.split(",")]
    for name in chosen_methods:
        if name not in METHODS and ":" not in name:
            raise EvalError(
                f"--methods: found {name!r}, expected some of {list(METHODS)}, or import paths "
                f"such as {PATH!r}"
            )
        try:
            ":" not in name or find(name)
        except ValueError as error:
            raise EvalError(f"--methods: {error}") from error
    return chosen_methods
