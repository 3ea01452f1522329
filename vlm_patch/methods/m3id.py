"""M3ID: multi-modal mutual information decoding. Favero et al., CVPR 2024,
https://arxiv.org/abs/2403.14003.

The longer the answer, the more what the model says without the image is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.method import Branch, ForwardContext, Method, State
from vlm_patch.primitives.contrast import NO_IMAGE, contrasted
from vlm_patch.validation import check_number


def weight(decay: float, place: Tensor) -> Tensor:
    """(1 - e^(-lambda t)) / e^(-lambda t) = e^(lambda t) - 1 at the t-th token of an answer."""
    return torch.expm1(decay * place)


def gated(edited: Tensor, logits: Tensor, gate: float) -> Tensor:
    """The edited logits `[..., V]` where the likeliest token of `logits` has a probability below
    the gate.
    """
    open_ = logits.softmax(-1).amax(-1, keepdim=True) < gate
    return torch.where(open_, edited, logits)


@dataclass
class AnswerStart(State):
    """end: `[B, 1]` (long), number of tokens up to the end of the prompt read last."""

    end: Any = None


@dataclass(frozen=True)
class M3ID(Method):
    """l + (e^(lambda t) - 1) (l - l') of the logits with and without the image, at the t-th token
    of the answer, counted from 1 (Favero et al.).

    decay: lambda, at least 0; the paper's forgetting rate. The weight grows without bound.
    gate: only where the likeliest token's probability is below it, 0 to 1. 1 acts at every token:
        the paper has no public code by which its own threshold could be checked.

    It costs a second forward per token, with a cache of its own. In a loop of your own without a
    cache every forward reads a prompt, whose next token is the first of an answer. Raises
    ValueError on values out of range.

        wrap(model, M3ID(gate=0.4))
    """

    name: ClassVar[str] = "m3id"
    state: ClassVar[type[State]] = AnswerStart

    decay: float = 0.02
    gate: float = 1.0

    def __post_init__(self) -> None:
        check_number("M3ID decay", self.decay, 0)
        check_number("M3ID gate", self.gate, 0, 1)

    def branches(self) -> Mapping[str, Branch]:
        return {NO_IMAGE: Branch(image=False)}

    def before_forward(self, forward: ForwardContext, state: AnswerStart) -> None:
        """Notes where the prompt ends."""
        at = forward.position
        if at.prompt_rows:
            end = at.past + at.prompt_rows
            state.end = torch.full_like(forward.valid[:, :1], end, dtype=torch.long)

    def edit_logits(
        self,
        logits: Tensor,
        others: Mapping[str | int, Tensor],
        forward: ForwardContext,
        state: AnswerStart,
    ) -> Tensor:
        rows = logits.shape[1]
        first = forward.position.past + forward.valid.shape[1] - rows
        predicted = torch.arange(first, first + rows, device=logits.device) + 1
        place = predicted - state.end.to(logits.device) + 1
        growth = weight(self.decay, place.to(logits.dtype))[..., None]
        return gated(contrasted(logits, others[NO_IMAGE], growth), logits, self.gate)
