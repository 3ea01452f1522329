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
        if method not in METHODS:
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
    """The methods as they act here; any other, by its name or import path, with its defaults."""
    if method not in METHODS:
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
    """

    title: str
    load: Load
    make_prompt: MakePrompt
    phases: Mapping[str, float]
    batches: tuple[int, ...] = (1,)
    steps: int = 4
    tokens: int = 48


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
ONLY_BY_NAME = (
    "attention-640",
    "attention-1500",
    "layer-3000",
    "stack-1500",
    "stack-3000",
    "llava-7b",
)
"""Not among the defaults of a CPU, which would take too long with them."""


def chosen(names: str | None, device: torch.device) -> list[str]:
    """The shapes a user names ("pocket,stack-640", "all"), or the defaults of the device."""
    if names is None:
        return [n for n in SHAPES if device.type == "cuda" or n not in ONLY_BY_NAME]
    listed = list(SHAPES) if names == "all" else [name.strip() for name in names.split(",")]
    for name in listed:
        if name not in SHAPES:
            raise EvalError(f"--shapes: found {name!r}, expected all, or some of {list(SHAPES)}")
    return listed
