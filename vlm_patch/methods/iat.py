"""IAT: increased attention to generated text. CVPR 2026, https://arxiv.org/abs/2603.04908.

The model looks harder at what it has written: it does so by itself where it names real objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo
from vlm_patch.primitives.key_bias import KeyBias, raised
from vlm_patch.validation import check_share, check_wholes


@dataclass(frozen=True)
class IAT(KeyBias):
    """Raises the attention scores of all tokens generated so far in this answer by `alpha` of their
    size, at every generated token.

    alpha: how much, 0 to 1; 0 changes nothing.
    layers: where. None: the published ones (5 to 17 of 32), scaled to the depth.

    It boosts the generated text, not the image. The first token of an answer is the stock model's;
    the row that predicts the next one has that token alone to look at. Raises ValueError on values
    out of range.

        wrap(model, IAT(alpha=0.8))
    """

    name: ClassVar[str] = "iat"

    alpha: float = 0.8
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_share("IAT alpha", self.alpha, "the published value is 0.8")
        check_wholes("IAT layers", self.layers)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("IAT layers", self.layers)
        if self.layers is not None:
            return self, []
        layers, notes = info.published_layers("IAT", 5, 17)
        return replace(self, layers=layers), notes

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.answer_rows(prompt=False) if self.alpha else None

    def coefficients(self, forward: ForwardContext, dtype: torch.dtype) -> Tensor:
        return self.alpha * forward.answer_keys().to(dtype).expand(len(forward.image), -1)

    def moved(self, scores: Tensor, coefficients: Tensor, forward: ForwardContext) -> Tensor:
        return raised(scores, coefficients)
