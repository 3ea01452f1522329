"""DoLa: decoding by contrasting layers. Chuang et al., ICLR 2024, https://arxiv.org/abs/2309.03883.

What an early layer would say is taken away from what the last one says: the early layer that
differs most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo
from vlm_patch.primitives.contrast import cut
from vlm_patch.validation import check_number, check_wholes


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence `[...]` of log-probabilities `[..., V]`."""
    middle = torch.logaddexp(one, other) - torch.log(one.new_tensor(2.0))
    halves = [(of.exp() * (of - middle)).nan_to_num(0.0).sum(-1) for of in (one, other)]
    return (halves[0] + halves[1]) / 2


def contrasted_layers(logits: Tensor, early: Tensor, beta: float) -> Tensor:
    """log p_N - log p_M of what `cut` keeps of p_N (paper, equations 2 to 5).

    logits `[..., V]` of the last layer, early `[C, ..., V]` of the candidates, of which M is the
    one with the largest divergence from N, token by token.
    """
    last, candidates = logits.log_softmax(-1), early.log_softmax(-1)
    apart = divergence(last.expand_as(candidates), candidates)
    chosen = apart.argmax(0)[None, ..., None].expand_as(candidates[:1])
    return cut(last - candidates.gather(0, chosen)[0], last, beta)


@dataclass(frozen=True)
class DoLa(Method):
    """log p of the last layer minus log p of the early layer that differs most from it, of tokens
    that are likely enough in the last (Chuang et al.).

    layers: the candidates, by what enters them (0: the embeddings; leave that out where a model
        uses them as its head too). None: every second one of the lower half, from 0 on (the
        paper's lower bucket for 32 layers).
    beta: a token stays if its probability is at least this share of the likeliest's, 0 to 1.

    A candidate is read through the model's last norm and head, which runs once more for each.
    Raises ValueError on values out of range.

        wrap(model, DoLa(layers=range(16, 32, 2)))
    """

    name: ClassVar[str] = "dola"

    layers: Sequence[int] | None = None
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_wholes("DoLa layers", self.layers)
        check_number("DoLa beta", self.beta, 0, 1)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("DoLa layers", self.layers)
        layers = self.layers
        if layers is None:
            layers = info.acting(range(0, max(1, info.depth // 2), 2))
        return replace(self, layers=tuple(layers)), []

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
        return contrasted_layers(logits, early, self.beta)
