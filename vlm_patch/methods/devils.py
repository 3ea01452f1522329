"""Devils in the Middle Layers (also HGAI, MiddleLayers). Jiang et al., CVPR 2025,
https://arxiv.org/abs/2411.16724.

Where heads agree on an image token, all of them look at it harder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo
from vlm_patch.primitives.key_bias import KeyBias, biased
from vlm_patch.validation import check_number, check_wholes


@dataclass(frozen=True)
class Devils(KeyBias):
    """Raises the attention scores of image tokens by `alpha` times their mean size over all heads
    of the layer, in the rows that predict the answer (Jiang et al.).

    alpha: how much; 0 changes nothing.
    layers: where. None: 5 to 18 of 32, the inclusive range that the release's captions were made
        with, scaled to the depth. Others, and the release's own function when it is called with
        the same numbers, take 5 to 17.

    The mean is over all heads as they were before any was edited, also over those that a head table
    switches off. Raises ValueError on values out of range.

        wrap(model, Devils(alpha=0.5, layers=range(5, 18)))
    """

    name: ClassVar[str] = "devils"
    edits_prompt_end: ClassVar[bool] = True

    alpha: float = 0.5
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_number("Devils alpha", self.alpha, 0)
        check_wholes("Devils layers", self.layers)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("Devils layers", self.layers)
        if self.layers is not None:
            return self, []
        layers, notes = info.published_layers("Devils", 5, 18)
        return replace(self, layers=layers), notes

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.answer_rows() if self.alpha else None

    def coefficients(self, forward: ForwardContext, dtype: torch.dtype) -> Tensor:
        return self.alpha * forward.image.to(dtype)

    def moved(self, scores: Tensor, coefficients: Tensor, forward: ForwardContext) -> Tensor:
        mine = scores.abs().mean(1, keepdim=True)
        return biased(scores, coefficients, forward.shard.gather(mine, 1).mean(1, keepdim=True))
