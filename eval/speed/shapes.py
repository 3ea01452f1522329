"""What is timed: shapes, their phases, and where the methods act in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from eval.errors import EvalError
from eval.speed.models import (
    LLAVA_7B,
    QWEN2_VL_7B,
    SINK_DIMS,
    Dims,
    Loaded,
    Prompt,
    build,
    decoder,
    described,
    embedded,
    llava_7b,
    pictured,
    pocket,
)
from vlm_patch import GIFT, VAR, VHR
from vlm_patch.methods.registry import find

METHODS = ("var", "gift", "vhr", "all")
TAU_SHARE = 0.25
"""Of the largest sink score there is; under the papers' 0.31 the pocket model has no sink."""


@dataclass(frozen=True)
class Acting:
    """Where the methods act: GIFT's and VHR's shares of 32 layers, VAR everywhere."""

    layers: int
    tau: float
    gift: tuple[int, ...]
    saliency: int
    vhr: tuple[int, ...]

    def describe(self, method: str) -> str:
        """In words, with the layers counted from 0."""
        if ":" in method:
            return f"{method} in its default layers"
        parts = {
            "var": "VAR in all layers",
            "gift": f"GIFT in {_list(self.gift)}, map of {self.saliency}",
            "vhr": f"VHR in {_list(self.vhr)}",
        }
        names = parts if method == "all" else [method]
        return f"{'; '.join(parts[name] for name in names)} (of {self.layers})"


def _list(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 2 else ", ".join(map(str, layers))


def acting(text: Any) -> Acting:
    """11 of 32 layers for GIFT with its map from the layer below, the last 15 of 32 for VHR.

    In one layer both act, and GIFT's map comes from that layer itself.
    """
    layers = text.num_hidden_layers
    first = min(layers - 1, round(layers * 12 / 32))
    gift = tuple(range(first, min(layers, first + max(1, round(layers * 11 / 32)))))
    vhr = tuple(range(layers - max(1, round(layers * 15 / 32)), layers))
    tau = TAU_SHARE * math.sqrt(text.hidden_size)
    return Acting(layers, tau, gift, max(0, first - 1), vhr)


def ours(method: str, at: Acting) -> list[Any]:
    """The library's methods, or one of somebody's own by its import path."""
    if ":" in method:
        return [find(method)()]
    return [
        {
            "var": VAR(tau=at.tau, dims=SINK_DIMS, exclude_last_layer=False),
            "gift": GIFT(alpha=4.0, saliency_layer=at.saliency, layers=at.gift),
            "vhr": VHR(layers=at.vhr),
        }[name]
        for name in _names(method)
    ]


def specs(method: str, at: Acting) -> list[Any]:
    """The same for the release-style implementation."""
    from eval.support.reference import Gift, Var, Vhr  # lives with the tests, as their reference

    return [
        {
            "var": Var(SINK_DIMS, at.tau, exclude_last_layer=False),
            "gift": Gift(4.0, at.saliency, at.gift),
            "vhr": Vhr(at.vhr),
        }[name]
        for name in _names(method)
    ]


def _names(method: str) -> tuple[str, ...]:
    return METHODS[:-1] if method == "all" else (method,)


Load: TypeAlias = Callable[[torch.device], Loaded]
MakePrompt: TypeAlias = Callable[[Loaded, int], Prompt]


@dataclass(frozen=True)
class Shape:
    """A model and its prompts. phases: seconds that a phase may take in all, by its name.

    load: makes the model on a device. make_prompt: makes a prompt for it with a batch of some size.
    beside: kinds of sides that are compared beside the library's own. one_by_one: the sides are
    made and measured one after the other, where the caches of all would not fit. setup: seconds
    for the model, its sides and what they compile.
    """

    title: str
    load: Load
    make_prompt: MakePrompt
    phases: Mapping[str, float]
    batches: tuple[int, ...] = (1,)
    steps: int = 4
    tokens: int = 48
    beside: tuple[str, ...] = ("again", "eager", "release", "text only")
    one_by_one: bool = False
    setup: float = 0.0

    @property
    def planned(self) -> float:
        """The seconds that it may take in all."""
        return self.setup + len(self.batches) * sum(self.phases.values())


def layers(title: str, dims: Dims, count: int, keys: int, **phases: float) -> Shape:
    """`count` layers whose prompt is embeddings of `keys` tokens."""
    return Shape(
        f"{title}, {keys} keys",
        lambda device: build(decoder(dims, count), device),
        lambda loaded, batch: embedded(loaded, keys, batch),
        phases,
    )


ONE, FOUR = "1 layer of LLaVA-1.5-7B", "4 layers of LLaVA-1.5-7B"
ALONE = "attention of LLaVA-1.5-7B alone"
SHAPES: dict[str, Shape] = {
    "pocket": Shape(
        "pocket model",
        pocket,
        described,
        {"prefill": 2, "decode": 2, "generate": 8, "idle": 4},
        batches=(1, 4),
    ),
    "pocket-16": Shape(
        "pocket model",
        pocket,
        described,
        {"prefill": 3, "decode": 3, "generate": 40},
        batches=(16,),
    ),
    "attention-640": layers(ALONE, LLAVA_7B.thin(), 1, 640, attention=5),
    "attention-1500": layers(ALONE, LLAVA_7B.thin(), 1, 1500, attention=8),
    "attention-3000": layers(ALONE, LLAVA_7B.thin(), 1, 3000, attention=35),
    "memory-3000": layers(f"{ALONE}, two layers", LLAVA_7B.thin(), 2, 3000, memory=60),
    "layer-640": layers(ONE, LLAVA_7B, 1, 640, prefill=8, decode=6),
    "layer-1500": layers(ONE, LLAVA_7B, 1, 1500, decode=25),
    "layer-3000": layers(ONE, LLAVA_7B, 1, 3000, prefill=30, decode=10),
    "gqa-640": layers("1 layer of Qwen2-VL-7B", QWEN2_VL_7B, 1, 640, prefill=8, decode=6),
    "stack-640": layers(FOUR, LLAVA_7B, 4, 640, prefill=90),
    "stack-1500": layers(FOUR, LLAVA_7B, 4, 1500, prefill=200, decode=20),
    "stack-3000": layers(FOUR, LLAVA_7B, 4, 3000, prefill=400, decode=20),
    "llava-7b": Shape(
        "LLaVA-1.5-7B, random weights, bfloat16",
        llava_7b,
        pictured,
        {"prefill": 30, "decode": 60, "generate": 150, "memory": 30},
        batches=(1, 8),
        tokens=128,
    ),
}


def card_shapes(load: Load, load_few: Load, short: int = 640, long: int = 3000) -> dict[str, Shape]:
    """What a card is timed with, on the model of `load` and, compiled, on one of fewer layers."""

    def of(keys: int) -> MakePrompt:
        return lambda loaded, batch: embedded(loaded, keys, batch)

    name = "LLaVA-1.5-7B in bfloat16"
    card: dict[str, Any] = {"steps": 8, "tokens": 128, "beside": ("again",)}
    both: dict[str, Any] = {**card, "batches": (1, 8)}

    def end(phase: str, batch: int, seconds: float) -> Shape:
        phases, batches = {phase: seconds}, (batch,)
        return Shape(f"{name}, 645 keys", load, pictured, phases, batches, setup=5.0, **card)

    def compiled(keys: int) -> Shape:
        title, phases = f"4 layers of {name}, {keys} keys", {"compiled": 3.0}
        return Shape(title, load_few, of(keys), phases, setup=30.0, **card)

    one = {"prefill": 4.0, "decode": 7.0, "idle": 3.0, "launches": 0.5, "waits": 0.5}
    more = {"prefill": 9.0, "decode": 8.0}
    titles = [f"{name}, {keys} keys" for keys in (short, long)]
    return {
        "card-640": Shape(titles[0], load, of(short), one, setup=15.0, **both),
        "card-answers": end("answers", 16, 10.0),
        "card-3000": Shape(titles[1], load, of(long), more, one_by_one=True, setup=8.0, **both),
        "card-memory": Shape(titles[1], load, of(long), {"memory": 4.0}, **card),
        "card-generate": end("generate", 8, 34.0),
        "card-compiled-640": compiled(short),
        "card-compiled-3000": compiled(long),
    }


SHAPES |= card_shapes(llava_7b, lambda device: llava_7b(device, 4))
ONLY_BY_NAME = (
    "attention-640",
    "attention-1500",
    "layer-3000",
    "stack-1500",
    "stack-3000",
    "llava-7b",
)
"""Not among the defaults, which would take too long with them."""


def chosen(names: str | None, device: torch.device) -> list[str]:
    """The shapes a user names ("pocket,stack-640", "all"), or the defaults of the device."""
    if names is None:
        on_card = device.type == "cuda"
        return [n for n in SHAPES if n.startswith("card-") == on_card and n not in ONLY_BY_NAME]
    listed = list(SHAPES) if names == "all" else [name.strip() for name in names.split(",")]
    for name in listed:
        if name not in SHAPES:
            raise EvalError(f"--shapes: found {name!r}, expected all, or some of {list(SHAPES)}")
    return listed
