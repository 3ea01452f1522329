"""python -m eval speed: what the methods cost, next to the stock model and to release-style code.

Two sides that are compared run in one process in turn, A B A B; what counts is the median of the
ratios of neighbours.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from eval.errors import EvalError
from eval.runs.config import Config
from eval.runs.generate import best_device
from eval.runs.provenance import environment
from eval.speed import table as speed_table
from eval.speed.memory import peaks
from eval.speed.models import Loaded
from eval.speed.shapes import METHODS, SHAPES, Shape, chosen
from eval.speed.sides import Side, check_acting, sides
from vlm_patch.methods.registry import METHODS as LIBRARY
from vlm_patch.methods.registry import PATH, find

COARSE = ("again", "eager", "release")
"""Kinds whose ratios are far from 1, and the stock model next to itself: they run in every third
round only, several of them next to one run of the stock model."""
IDLE_STEPS, IDLE_PAIRS = 8, 16
"""Every head off costs a hundredth of a step: it takes short runs, and 16 times as many pairs."""


@dataclass(frozen=True)
class Row:
    """One side of one phase of a shape.

    values, stock: seconds of the pairs, in order; megabytes where the phase is "memory". on: the
    layers, in words. change: the largest change of a logit.
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

    @property
    def ratios(self) -> list[float]:
        return [own / stock for own, stock in zip(self.values, self.stock, strict=True)]

    def as_json(self) -> dict[str, Any]:
        shares = self.ratios
        summary = {"median": median(shares), "min": min(shares), "max": max(shares)}
        named = {**asdict(self), "title": SHAPES[self.shape].title}
        return {**named, "value": median(self.values), "ratio": summary}


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
    phase: str, batch: int, methods: Sequence[str], layers: int
) -> list[tuple[str, str]]:
    """The (kind, method) pairs that a phase compares with stock.

    "again" is the stock model once more: its ratio is the noise of this machine.
    Release-style has batch 1 only. In one layer alone GIFT would read its map where it acts, which
    takes a pass more than in a model: prefill is not compared there.
    """
    if phase == "idle":
        return [("idle", "all")] if batch == 1 else []
    if layers == 1 and phase in ("prefill", "attention"):
        methods = [method for method in methods if method not in ("gift", "all")]
    pairs = [("ours", method) for method in methods]
    pairs += [("eager", "")] if phase == "memory" else [("again", ""), ("eager", "")]
    if batch == 1:
        pairs += [("release", method) for method in methods if method in METHODS]
    if phase == "prefill" and "vhr" in methods:
        pairs.append(("text only", ""))
    return pairs


def measure(name: str, methods: Sequence[str], rounds: int, device: torch.device) -> Iterator[Row]:
    """The rows of a shape, phase by phase."""
    shape = SHAPES[name]
    if set(shape.phases) - {"memory"}:
        loaded = shape.load(device)
        for batch in shape.batches:
            yield from _timed(name, loaded, batch, methods, rounds)
        del loaded
    if "memory" in shape.phases:
        yield from _memory(name, methods, device)


def _timed(
    name: str, loaded: Loaded, batch: int, methods: Sequence[str], rounds: int
) -> Iterator[Row]:
    """All phases of a shape but memory, on the same sides."""
    shape, layers = SHAPES[name], loaded.text.num_hidden_layers
    phases = {p: compared_sides(p, batch, methods, layers) for p in shape.phases if p != "memory"}
    all_pairs = dict.fromkeys(pair for pairs in phases.values() for pair in pairs)
    prompt = shape.make_prompt(loaded, batch)
    with sides(loaded, prompt, [("stock", ""), *all_pairs]) as (stock, *others):
        stock.prefill()
        for phase, pairs_of_phase in phases.items():
            compared = [side for side in others if (side.kind, side.method) in pairs_of_phase]
            yield from _phase(name, phase, stock, compared, rounds)


def _phase(
    name: str, phase: str, stock: Side, others: Sequence[Side], rounds: int
) -> Iterator[Row]:
    shape = SHAPES[name]
    for side in others:
        if side.cache is None and phase not in ("prefill", "attention"):
            side.prefill()
    calls = {side.name: _call(side, phase, shape) for side in others}
    coarse = [side.name for side in others if side.kind in COARSE]
    run, most = _call(stock, phase, shape), shape.phases[phase]
    most_pairs = IDLE_PAIRS * rounds if phase == "idle" else rounds
    pairs = interleaved(run, calls, most_pairs, most, coarse)
    for side in others:
        change = check_acting(side, stock) if side.kind in ("ours", "release") else None
        stocks, own = map(list, zip(*pairs[side.name], strict=True))
        side_of = side.kind, side.method, side.on
        yield Row(name, phase, side.prompt.batch, side.layers, *side_of, own, stocks, change)


def _call(side: Side, phase: str, shape: Shape) -> Callable[[], float]:
    return {
        "prefill": side.prefill,
        "decode": lambda: side.decode(shape.steps),
        "idle": lambda: side.decode(IDLE_STEPS),
        "attention": side.attention,
        "generate": lambda: side.generate(shape.tokens),
    }[phase]


def _memory(name: str, methods: Sequence[str], device: torch.device) -> Iterator[Row]:
    pairs_of_phase = [("stock", ""), *compared_sides("memory", 1, methods, 0)]
    megabytes = peaks(name, pairs_of_phase, device, torch.get_num_threads())
    stock = next(megabytes)
    for (kind, method), own in zip(pairs_of_phase[1:], megabytes, strict=True):
        yield Row(name, "memory", 1, 0, kind, method, "", [own], [stock])


def speed(
    out: Path,
    shapes: str | None = None,
    methods: str | None = None,
    rounds: int = 25,
    threads: int | None = None,
    device: str | None = None,
) -> None:
    """Measure, print the table, and write it and the numbers behind it to `out`."""
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device or best_device())
    if where.type == "cuda" and not torch.cuda.is_available():
        raise EvalError("--device cuda: torch sees no CUDA device on this machine")
    names, acting_methods = chosen(shapes, where), _methods(methods)
    record: dict[str, Any] = {"machine": machine(where), "rounds": rounds, "rows": []}
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for name in tqdm(names, desc="speed", unit=" shapes"):
        for row in measure(name, acting_methods, rounds, where):
            record["rows"].append(row.as_json())
        record["minutes"] = (time.perf_counter() - start) / 60
        text = json.dumps(record, indent=1)
        (out / "speed.json").write_text(f"{text}\n", encoding="utf-8")
    table = speed_table.markdown(record)
    (out / "speed.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\n{out} holds speed.md and speed.json.")


def _methods(names: str | None) -> list[str]:
    chosen_methods = list(METHODS) if names is None else [n.strip() for n in names.split(",")]
    for name in chosen_methods:
        known = list(dict.fromkeys((*METHODS, *LIBRARY)))
        if name not in known and ":" not in name:
            raise EvalError(
                f"--methods: found {name!r}, expected some of {known}, or import paths such as "
                f"{PATH!r}"
            )
        try:
            name in METHODS or find(name)()
        except ValueError as error:
            raise EvalError(f"--methods: {error}") from error
    return chosen_methods


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    on_cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if on_cuda else _processor()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        **environment(Config(device=str(device))),
    }


def _processor() -> str:
    """The name of the processor, where the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
