"""DeCo: dynamic correction decoding. Wang et al., ICLR 2025, https://arxiv.org/abs/2410.11779.

What an earlier layer is surest of, among the last layer's candidates, is added to the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo
from vlm_patch.validation import check_number, check_whole, check_wholes

PUBLISHED, DEPTH = range(20, 29), 32


def candidates(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """The likeliest tokens (bool `[..., V]`): as many as reach the probability `top_p` together,
    and no more than `top_k`.
    """
    likely, order = logits.softmax(-1).sort(-1, descending=True)
    kept = likely.cumsum(-1) - likely < top_p
    kept[..., top_k:] = False
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def corrected(logits: Tensor, early: Tensor, kept: Tensor, alpha: float) -> Tensor:
    """l_N + alpha q l_M of the candidates `kept`, -inf elsewhere (paper, equations 4 and 5).

    early `[C, ..., V]`: logits of earlier layers; M is the one that gives any candidate the highest
    probability, and q that probability.
    """
    sure = early.softmax(-1).masked_fill(~kept, 0.0).amax(-1)
    most, layer = sure.max(0)
    chosen = early.gather(0, layer[None, ..., None].expand_as(early[:1]))[0]
    return (logits + alpha * most[..., None] * chosen).masked_fill(~kept, -torch.inf)


@dataclass(frozen=True)
class DeCo(Method):
    """Adds to the last layer's logits those of the earlier layer that is surest of one of its
    likeliest tokens (Wang et al.).

    layers: the earlier layers, by what enters them. None: 20 to 28 of 32, which are the outputs of
        blocks 19 to 27 (the paper's for LLaVA-1.5-7B); scaled to other depths.
    alpha: strength of the correction, at least 0.
    top_p, top_k: which tokens are candidates; all others are out.

    A layer is read through the model's last norm and head, which runs once more for each. Raises
    ValueError on values out of range.

        wrap(model, DeCo(alpha=0.3))
    """

    name: ClassVar[str] = "deco"

    layers: Sequence[int] | None = None
    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int = 20

    def __post_init__(self) -> None:
        check_wholes("DeCo layers", self.layers)
        check_number("DeCo alpha", self.alpha, 0)
        check_number("DeCo top_p", self.top_p, 0, 1, above=True)
        check_whole("DeCo top_k", self.top_k)
        if not self.top_k:
            raise ValueError("DeCo top_k: found 0, expected an integer of at least 1")

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("DeCo layers", self.layers)
        if self.layers is not None:
            return replace(self, layers=tuple(self.layers)), []
        last = info.depth - 1
        scaled = [min(last, round(layer * info.depth / DEPTH)) for layer in PUBLISHED]
        layers = info.acting(range(scaled[0], scaled[-1] + 1))
        notes = [] if info.depth == DEPTH else [f"DeCo layers={list(layers)}"]
        return replace(self, layers=layers), notes

    def early_layers(self) -> Sequence[int]:
        return self.layers or ()

    def edit_logits(
        self,
        logits: Tensor,
        others: Mapping[str | int, Tensor],
        forward: ForwardContext,
        state: Any,
    ) -> Tensor:
        early = torch.stack([others[layer] for layer in self.early_layers()])
        kept = candidates(logits, self.top_p, self.top_k)
        return corrected(logits, early, kept, self.alpha)
