"""MemVR: memory-space visual retracing. Zou et al., ICML 2025, https://arxiv.org/abs/2410.03577.

Where a middle layer is unsure of the next token, the MLP behind it looks at the image once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.errors import PatchError
from vlm_patch.method import ForwardContext, Method, ModelInfo, State
from vlm_patch.validation import check_number, check_wholes

CANDIDATES = 10


def uncertainty(logits: Tensor) -> Tensor:
    """The entropy of the ten largest logits, over ln 10 (paper, equation 5): logits `[..., V]`,
    returns `[...]`, 0 for a sure one to 1.
    """
    chances = logits.topk(min(CANDIDATES, logits.shape[-1])).values.softmax(-1)
    entropy: Tensor = torch.special.entr(chances).sum(-1)
    return entropy / math.log(CANDIDATES)


def retrace(hidden: Tensor, features: Tensor) -> Tensor:
    """y = (x Z^T) Z (paper, equation 7), an MLP whose keys and values are the image: x `[B, S, D]`
    entering it, features Z `[B, N, D]`, 0 where there is none.
    """
    return hidden @ features.transpose(1, 2) @ features


def mix(output: Tensor, traced: Tensor, sizes: Tensor, share: float) -> Tensor:
    """(1 - a) FFN(x) + a (mean |FFN(x)| / mean |y|) y (paper, equation 8).

    output FFN(x), traced y `[B, S, D]`. sizes `[B, S]`: that quotient. share: a.
    """
    return torch.lerp(output, sizes[..., None] * traced, share)


def gather(embeds: Tensor, chosen: Tensor) -> Tensor:
    """The tokens of embeds `[B, S, D]` that are `chosen` `[B, S]`, in the front of every sample,
    with zeros behind them: `[B, N, D]`, N of the sample that has most.
    """
    count = int(chosen.sum(1).max())
    order = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :count]
    kept = chosen.gather(1, order)[..., None]
    return embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])) * kept


@dataclass
class MemoryState(State):
    """What MemVR remembers.

    features: by where a prompt starts, `[B, N, D]`, its image tokens as they enter the decoder, 0
        behind them.
    done: `[B, R]`, the last rows whose one look was taken in this forward. now: those that take it
    in the layer at hand.
    """

    features: dict[int, Tensor] = field(default_factory=dict)
    done: Tensor | None = None
    now: Tensor | None = None


@dataclass(frozen=True)
class MemVR(Method):
    """Mixes image features into the output of one MLP, the first of `layers` that the residual
    stream enters unsure of the next token (Zou et al., section 4).

    share: a, how much of the output they make, 0 to 1; the release takes 0.12, for captions 0.31.
    threshold: gamma, the least uncertainty, 0 to 1.
    layers: where. None: the published ones (7 to 16 of 32), or those scaled to the depth.

    A prompt has one look for all its rows, decided by its last; every token behind it has its own.
    Raises ValueError on values out of range.

        wrap(model, MemVR(share=0.2, layers=range(5, 17)))
    """

    name: ClassVar[str] = "memvr"
    state: ClassVar[type[State]] = MemoryState
    reads_logits: ClassVar[bool] = True

    share: float = 0.12
    threshold: float = 0.75
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_number("MemVR share", self.share, 0, 1)
        check_number("MemVR threshold", self.threshold, 0, 1)
        check_wholes("MemVR layers", self.layers)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("MemVR layers", self.layers)
        if self.layers is not None:
            return self, []
        if "layers" in info.profile:
            return replace(self, layers=tuple(info.profile["layers"])), []
        first, last = (round(info.depth * layer / 32) for layer in (7, 17))
        layers = info.acting(range(first, max(last, first + 1)))
        return replace(self, layers=layers), [f"MemVR layers={list(layers)}"]

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def decides_on_last_row(self, forward: ForwardContext) -> bool:
        return forward.position.prompt_rows > 0

    def before_forward(self, forward: ForwardContext, state: MemoryState) -> None:
        state.done = state.now = None
        at = forward.position
        if not at.prompt_rows:
            return
        if at.resumed or not at.ends:
            raise PatchError(
                "memvr decides by the last row of a prompt what it does in the rows before, so a "
                "prompt must be read in one forward: leave prefill_chunk_size and a cached "
                'beginning out, or generate inside `with patch.disabled("memvr"):` (before a new '
                "turn, feed the answer token by token)"
            )
        image = forward.image[:, forward.new]
        if at.starts and image.any():  # what stood behind may have been cut from the cache
            before = {past: known for past, known in state.features.items() if past < at.past}
            state.features = {**before, at.past: gather(self._embeds(forward), image)}

    def _embeds(self, forward: ForwardContext) -> Tensor:
        embeds = forward.inputs.get("inputs_embeds")
        if not isinstance(embeds, Tensor):
            raise PatchError(
                "memvr looks at the image tokens as they enter the decoder, but this model hands "
                f"it {sorted(forward.inputs)} and no inputs_embeds: it cannot be used here"
            )
        return embeds.detach().to(torch.promote_types(embeds.dtype, torch.float32))

    def observe_readout(
        self, layer: int, logits: Tensor, forward: ForwardContext, state: MemoryState
    ) -> None:
        unsure = uncertainty(logits) > self.threshold
        done = torch.zeros_like(unsure) if state.done is None else state.done.to(unsure.device)
        state.now, state.done = unsure & ~done, unsure | done

    def edit_mlp(
        self, layer: int, output: Tensor, hidden: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        if not state.features:
            raise PatchError(
                "memvr was off when the image of this conversation was read: switch it on before "
                "the prompt"
            )
        # half precision would overflow in the second product
        features = torch.cat([*state.features.values()], 1).to(hidden.device)
        traced, precise = retrace(hidden.to(features.dtype), features), output.to(features.dtype)
        sizes = self._sizes(precise, forward) / self._sizes(traced, forward)
        mixed = mix(precise, traced, sizes, self.share)
        return torch.where(
            _per_row(state.now.to(output.device), forward)[..., None], mixed, precise
        )

    def _sizes(self, rows: Tensor, forward: ForwardContext) -> Tensor:
        """The mean magnitude `[B, S]` of rows `[B, S, D]`: over all of a prompt's, and of each one
        behind it.
        """
        prompt, size = forward.position.prompt_rows, rows.abs().mean(-1)
        if prompt:
            valid = forward.valid[:, :prompt]
            whole = (size[:, :prompt] * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
            size = torch.cat((whole.expand(-1, prompt), size[:, prompt:]), 1)
        return size.clamp_min(torch.finfo(size.dtype).tiny)


def _per_row(last: Tensor, forward: ForwardContext) -> Tensor:
    """What was decided for the R last rows `[B, R]`, for all `[B, S]`."""
    before = forward.valid.shape[1] - last.shape[1]
    return torch.cat((last[:, :1].expand(-1, before), last), 1)
