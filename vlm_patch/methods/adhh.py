"""AD-HH: adaptive deactivation of hallucination heads. Yang et al., ICLR 2025,
https://github.com/TianyunYoung/Hallucination-Attribution.

Heads that are known to hallucinate see no text where they mostly look at text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_patch import heads as head_tables
from vlm_patch.heads import HeadSpec
from vlm_patch.method import ForwardContext, Method, ModelInfo, State
from vlm_patch.primitives.key_bias import PerKey
from vlm_patch.primitives.reweighting import KeyReweighting
from vlm_patch.validation import check_number


def text_shares(masses: Tensor, tau: float) -> Tensor:
    """The text's weights become 0 where they add up to `tau` or more; nothing is renormalised.

    masses `[B, 2, H, R]`: attention to text behind the image, and to all keys. Returns what both
    groups add to the factor of their keys, `[B, 2, H, R]`.
    """
    dropped = (masses[:, 0] >= tau).to(masses.dtype)
    return torch.stack((-dropped, torch.ones_like(dropped)), 1)


@dataclass(frozen=True)
class ADHH(KeyReweighting):
    """Takes all attention from text in the given heads, where it has `tau` of it or more, in the
    rows that predict the answer (Yang et al.).

    heads: those that hallucinate, in any spelling of a head table, such as "12:0,3; 14:7". They are
        found by an attribution on the model itself (20 of LLaVA-1.5-7B's, 35 of 13B's); the
        authors' code names theirs. There is no default.
    tau: the least attention to text that counts, 0 to 1: 0.4 for LLaVA-1.5, 0.5 for MiniGPT-4.

    Text is every key behind the image that is no image: the rest of the prompt and what was
    generated, but neither BOS nor the system prompt. Each sample decides for itself, where the
    release adds up over the batch. The release's variant for newer models, which drops the heads
    altogether, is not built. Raises ValueError on values out of range.

        wrap(model, ADHH(heads="12:0,3; 14:7"))
    """

    name: ClassVar[str] = "adhh"
    state: ClassVar[type[State]] = PerKey
    edits_prompt_end: ClassVar[bool] = True

    heads: str | Mapping[int, Iterable[int] | str] | None = None
    tau: float = 0.4

    def __post_init__(self) -> None:
        check_number("ADHH tau", self.tau, 0, 1)
        if self.heads is None:
            raise ValueError(
                'ADHH heads: found none, expected the heads that hallucinate, such as "12:0,3; '
                "14:7\"; the authors' code (github.com/TianyunYoung/Hallucination-Attribution) "
                "names those of LLaVA-1.5 and MiniGPT-4, and finds them for other models"
            )

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        try:
            table = head_tables.parse(self.default_heads(()), info.depth, info.heads)
        except ValueError as error:
            raise ValueError(f"ADHH heads: {error}") from error
        info.check_layers("ADHH heads", table.any(1).nonzero().flatten().tolist())
        return self, []

    def default_heads(self, layers: Sequence[int]) -> HeadSpec:
        assert self.heads is not None
        return self.heads

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.answer_rows()

    def before_forward(self, forward: ForwardContext, state: PerKey) -> None:
        image = forward.image
        text = ~image & (image.cumsum(1) > 0)
        state.values = torch.stack((text, torch.ones_like(text)), 1).float()

    def groups(self, layer: int, forward: ForwardContext, state: PerKey) -> Tensor:
        found: Tensor = state.values
        return found

    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        return text_shares(masses, self.tau)
