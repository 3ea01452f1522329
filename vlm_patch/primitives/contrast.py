"""Next-token logits against those of a second stream, or of an early layer, of the same model.

All functions take logits `[..., V]`; tokens that are out are -inf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_patch.method import Branch, ForwardContext, Method

NO_IMAGE = "no image"
"""What methods call the stream without the image."""


def contrasted(logits: Tensor, other: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 + alpha) l - alpha l', away from the other stream; alpha broadcasts to the logits."""
    return (1 + alpha) * logits - alpha * other


def cut(edited: Tensor, logits: Tensor, beta: float) -> Tensor:
    """The edited logits of tokens whose probability under `logits` is at least `beta` times that of
    the likeliest; -inf for the others. 0 keeps all.
    """
    if not beta:
        return edited
    threshold = logits.amax(-1, keepdim=True) + math.log(beta)
    return edited.masked_fill(logits < threshold, -torch.inf)


def guided(logits: Tensor, other: Tensor, gamma: float, beta: float) -> Tensor:
    """gamma log p - (gamma - 1) log p', of what `cut` keeps of p (PAI, equation of the release)."""
    likely, unlikely = logits.log_softmax(-1), other.log_softmax(-1)
    return cut(contrasted(likely, unlikely, gamma - 1), likely, beta)


class Guided(Method):
    """A method whose logits may be guided away from what the model says without the image.

    gamma: at least 1, where there is no second stream.
    cutoff: see `guided`.
    """

    gamma: float
    cutoff: float

    @property
    def edits_logits(self) -> bool:
        return self.gamma > 1

    def branches(self) -> Mapping[str, Branch]:
        return {NO_IMAGE: Branch(image=False)} if self.edits_logits else {}

    def edit_logits(
        self,
        logits: Tensor,
        others: Mapping[str | int, Tensor],
        forward: ForwardContext,
        state: Any,
    ) -> Tensor:
        return guided(logits, others[NO_IMAGE], self.gamma, self.cutoff)
