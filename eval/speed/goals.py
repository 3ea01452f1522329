"""What must be reached, by machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

METHODS = {"var": "VAR, all layers", "gift": "GIFT", "vhr": "VHR", "all": "all three"}
ALL = dict.fromkeys(METHODS, float("inf"))
"""Figures without a bound."""


@dataclass(frozen=True)
class Goal:
    """A line of the table: one phase of a shape, with a bound for every method that has one.

    figure: how the line is read. "ratio": times stock, at most the bound. "share": of stock's
    questions per second, at least the bound. "megabytes": above stock. "microseconds": a layer,
    above stock. "faster": how many times faster than release-style code, at least the bound.
    "count": the figure itself, beside stock's. kind: of the sides that are judged. rows: to the
    bound of VHR comes what its prompt without the image takes.
    """

    title: str
    shape: str
    phase: str
    bounds: Mapping[str, float]
    batch: int = 1
    figure: str = "ratio"
    kind: str = "ours"
    rows: bool = False


def methods(var: float, gift: float, vhr: float, together: float) -> dict[str, float]:
    return {"var": var, "gift": gift, "vhr": vhr, "all": together}


CPU = (
    Goal(
        "prefill, 4 stacked 7B layers, S = 640",
        "stack-640",
        "prefill",
        methods(1.03, 1.02, 1.02, 1.06),
        rows=True,
    ),
    Goal("decode, 7B layer, 1500 keys", "layer-1500", "decode", methods(1.03, 1.03, 1.01, 1.05)),
    Goal(
        "attention alone, prefill, S = 3000",
        "attention-3000",
        "attention",
        {"var": 1.15, "vhr": 1.02},
    ),
    Goal(
        "the same, release-style by ours",
        "attention-3000",
        "attention",
        {"var": 4.0},
        figure="faster",
    ),
    Goal(
        "pocket model, generate, batch 16",
        "pocket-16",
        "generate",
        {**ALL, "vhr": 1.15},
        batch=16,
    ),
    Goal(
        "peak memory above stock, S = 3000, MB",
        "memory-3000",
        "memory",
        methods(130, 64, 16, 160),
        figure="megabytes",
    ),
    Goal(
        "every head off, us a layer",
        "pocket",
        "idle",
        {"all": 30.0},
        figure="microseconds",
        kind="idle",
    ),
)


def _decode(keys: int, batch: int) -> Goal:
    bounds = methods(1.00, 1.00, 1.02, 1.05)
    return Goal(f"decode, S = {keys}, batch {batch}", f"card-{keys}", "decode", bounds, batch)


def _prefill(keys: int, batch: int) -> Goal:
    one, eight = methods(1.12, 1.08, 1.15, 1.30), methods(1.04, 1.04, 1.15, 1.20)
    bounds = one if batch == 1 else eight
    return Goal(f"prefill, S = {keys}, batch {batch}", f"card-{keys}", "prefill", bounds, batch)


def _compiled(keys: int) -> Goal:
    title = f"decode, compiled, static cache, S = {keys}, 4 layers"
    return Goal(title, f"card-compiled-{keys}", "compiled", methods(1.03, 1.03, 1.02, 1.05))


SIZES = tuple((keys, batch) for keys in (640, 3000) for batch in (1, 8))
CARD = (
    *(_decode(*size) for size in SIZES),
    *(_compiled(keys) for keys in (640, 3000)),
    *(_prefill(*size) for size in SIZES),
    Goal(
        "generate 128 tokens, S = 645, batch 8",
        "card-generate",
        "generate",
        methods(1.02, 1.02, 1.03, 1.06),
        batch=8,
    ),
    Goal(
        "answers of 2 tokens, questions a second by stock's, S = 645, batch 16",
        "card-answers",
        "answers",
        methods(0.92, 0.95, 0.88, 0.82),
        batch=16,
        figure="share",
    ),
    Goal("every head off, decode, S = 640", "card-640", "idle", {"all": 1.01}, kind="idle"),
    Goal(
        "peak memory above stock, S = 3000, MB",
        "card-memory",
        "memory",
        methods(32, 32, 16, 64),
        figure="megabytes",
    ),
    Goal("launches a token and layer", "card-640", "launches", ALL, figure="count"),
    Goal("host waits a token", "card-640", "waits", ALL, figure="count"),
)
