"""PAI: paying more attention to image. Liu et al., ECCV 2024, https://arxiv.org/abs/2407.21771.

Every image token gets a higher attention score while the answer is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo
from vlm_patch.primitives.contrast import Guided
from vlm_patch.primitives.key_bias import KeyBias, raised
from vlm_patch.validation import check_number, check_share, check_wholes


@dataclass(frozen=True)
class PAI(Guided, KeyBias):
    """Raises the attention scores of all image tokens by `alpha` of their size, in the rows that
    predict the answer (Liu et al.).

    alpha: how much, 0 to 1; 0 changes nothing.
    layers: where. None: all but the first two.
    gamma: at least 1, the contrast with a second stream without the image: gamma log p -
        (gamma - 1) log p'. 1, no contrast and no second stream; published runs have 1.1.
    cutoff: with the contrast, a token stays if its probability is at least this share of the
        likeliest one's.
    semantics: "paper" (the last row of a prompt and every generated token) or "release" (generated
        tokens only, which is what the release does whenever its contrast is on).

    `PAI.paper()` is the setting for LLaVA in general, `PAI.release()` what its scripts run for long
    captions. Raises ValueError on values out of range.

        wrap(model, PAI(alpha=0.2))
    """

    name: ClassVar[str] = "pai"
    edits_prompt_end: ClassVar[bool] = True

    alpha: float = 0.5
    layers: Sequence[int] | None = None
    semantics: str = "paper"
    gamma: float = 1.0
    cutoff: float = 0.1

    @classmethod
    def paper(cls) -> PAI:
        """The strength for any task."""
        return cls(alpha=0.2)

    @classmethod
    def release(cls) -> PAI:
        """The strength for captions of LLaVA, as the release acts beside its contrast."""
        return cls(alpha=0.5, semantics="release")

    def __post_init__(self) -> None:
        check_share("PAI alpha", self.alpha, "published values are 0.2 and 0.5")
        check_wholes("PAI layers", self.layers)
        check_number("PAI gamma", self.gamma, 1)
        check_number("PAI cutoff", self.cutoff, 0, 1)
        if self.semantics not in ("paper", "release"):
            raise ValueError(
                f'PAI semantics: found {self.semantics!r}, expected "paper" or "release"'
            )

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("PAI layers", self.layers)
        if self.layers is not None:
            return self, []
        return replace(self, layers=info.layers_from(2)), []

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.answer_rows(prompt=self.semantics == "paper") if self.alpha else None

    def coefficients(self, forward: ForwardContext, dtype: torch.dtype) -> Tensor:
        return self.alpha * forward.image.to(dtype)

    def moved(self, scores: Tensor, coefficients: Tensor, forward: ForwardContext) -> Tensor:
        return raised(scores, coefficients)
