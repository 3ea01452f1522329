"""ICD: instruction contrastive decoding. Wang et al., ACL Findings 2024,
https://arxiv.org/abs/2403.18715.

What the model would say in a confusing role is taken away from what it says to the question alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlm_patch.method import Branch, ForwardContext, Method
from vlm_patch.primitives.contrast import contrasted, cut
from vlm_patch.validation import check_number, check_wholes

CONFUSED = "confused"
ROLE = "You are a confused objects detector to provide a fuzzy overview or impression of the image."


@dataclass(frozen=True)
class ICD(Method):
    """(1 + alpha) l - alpha l' of the logits for the question and for the question behind a
    confusing role, of tokens that are likely enough for the question (Wang et al.).

    alpha: strength of the contrast, at least 0; 0.5 or 1 in the release.
    beta: a token stays if its probability is at least this share of the likeliest's, 0 to 1.
    prefix: the role, put in front of the question: a text, which takes the model's processor, or
        token ids.

    It costs a second forward per token, with a cache of its own. The question is found as `wrap`'s
    processor or `patch.prompt(query=...)` tells it. No relation to induce-then-contrast decoding,
    which has the same initials. Raises ValueError on values out of range.

        wrap(model, ICD(alpha=0.5), processor=processor)
    """

    name: ClassVar[str] = "icd"
    reads_question: ClassVar[bool] = True

    alpha: float = 1.0
    beta: float = 0.1
    prefix: str | Sequence[int] = ROLE

    def __post_init__(self) -> None:
        check_number("ICD alpha", self.alpha, 0)
        check_number("ICD beta", self.beta, 0, 1)
        if not isinstance(self.prefix, str):
            check_wholes("ICD prefix", self.prefix)
        if not self.prefix:
            raise ValueError(
                f"ICD prefix: found {self.prefix!r}, expected a text or token ids to put in front "
                "of the question"
            )

    def branches(self) -> Mapping[str, Branch]:
        prefix = self.prefix if isinstance(self.prefix, str) else tuple(self.prefix)
        return {CONFUSED: Branch(prefix=prefix)}

    def edit_logits(
        self,
        logits: Tensor,
        others: Mapping[str | int, Tensor],
        forward: ForwardContext,
        state: Any,
    ) -> Tensor:
        return cut(contrasted(logits, others[CONFUSED], self.alpha), logits, self.beta)
