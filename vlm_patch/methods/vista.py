"""VISTA: visual information steering with token-logit augmentation. Li et al., ICML 2025,
https://arxiv.org/abs/2502.03628.

What the image adds to the end of the prompt is added to every token, so that it does not fade
while the answer is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlm_patch.errors import PatchError
from vlm_patch.method import ExtraForward, ForwardContext, Method, ModelInfo, State, Watcher
from vlm_patch.methods.vhr import without_image
from vlm_patch.validation import check_number, check_wholes


def steer_towards(output: Tensor, vector: Tensor, strength: float) -> Tensor:
    """|m| unit(unit(m) + lambda (1 + max(0, cos(m, -v))) unit(v)) (paper, section 4.1): turned
    towards v, most where it points away from it, at the same length.

    output m `[B, S, D]`: of an MLP. vector v `[B, D]`. strength: lambda. In float32 at least.
    """
    kind = torch.promote_types(output.dtype, torch.float32)
    output, towards = output.to(kind), normalize(vector.to(kind), dim=-1)[:, None]
    length, direction = output.norm(dim=-1, keepdim=True), normalize(output, dim=-1)
    away = -(direction * towards).sum(-1, keepdim=True)
    push = strength * (1 + away.clamp_min(0))
    turned: Tensor = length * normalize(direction + push * towards, dim=-1)
    return turned


def augment_logits(logits: Tensor, early: Tensor, share: float) -> Tensor:
    """(1 - gamma) l + gamma mean l_k (paper, section 4.2): the logits drawn to what the layers
    before the last would have said.

    logits l `[..., V]`. early `[..., E, V]`: readouts l_k of E layers. share: gamma.
    """
    return torch.lerp(logits, early.mean(-2), share)


@dataclass
class VisionState(State):
    """vector: by layer, `[B, D]`, what the image adds to the residual stream leaving it, in the
    last row of the prompt."""

    vector: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VISTA(Method):
    """Turns what every MLP adds to the residual stream towards what the image added to the prompt's
    last row (Li et al., section 4.1).

    strength: lambda; 0 changes nothing. The paper uses 0.17 for captions, 0.01 for POPE.
    layers: where. None: all.

    The vectors come of two more passes over each first prompt, with and without its image. The
    second half, the augmentation of logits, is the function `augment_logits`; the method does not
    apply it yet. Raises ValueError on values out of range.

        wrap(model, VISTA(strength=0.1))
    """

    name: ClassVar[str] = "vista"
    state: ClassVar[type[State]] = VisionState

    strength: float = 0.17
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_number("VISTA strength", self.strength, 0)
        check_wholes("VISTA layers", self.layers)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("VISTA layers", self.layers)
        layers = info.acting(range(info.depth)) if self.layers is None else self.layers
        return replace(self, layers=layers), []

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def probe(
        self, forward: ForwardContext, state: VisionState, layers: list[int], run: ExtraForward
    ) -> Method:
        """The prompt as it is, and without its image: keeps what the last row differs by."""
        if not forward.position.first_prompt:
            return self
        if forward.position.resumed or not forward.position.ends:
            raise PatchError(
                "vista steers every row of a prompt by what the image adds to the last one, so the "
                "whole prompt must be read in one forward, with its image and without a cache: "
                "leave prefill_chunk_size and a cached beginning out, or generate inside "
                '`with patch.disabled("vista"):` (before a new turn, feed the answer token by '
                "token)"
            )
        state.clear()
        text: dict[int, Tensor] = {}
        last = forward.position.prompt_rows - 1

        def keep_text(layer: int, hidden: Tensor) -> None:
            if layer in layers:
                text[layer] = hidden[:, -1]

        def keep(layer: int, hidden: Tensor) -> None:
            if layer in layers:
                state.vector[layer] = hidden[:, last] - text[layer]

        run(without_image(forward), Watcher(output=keep_text))
        run(forward.inputs, Watcher(output=keep))
        return self

    def before_forward(self, forward: ForwardContext, state: VisionState) -> None:
        at = forward.position
        if at.starts and not at.first_prompt and forward.image[:, forward.new].any():
            warnings.warn(
                "VISTA steers by the image of the conversation's first prompt, also where a later "
                "turn has one. For a vector of its own, give that turn without a cache.",
                stacklevel=2,
            )

    def edit_mlp(
        self, layer: int, output: Tensor, hidden: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        if layer not in state.vector:
            raise PatchError(
                f"vista is on in layer {layer}, but knows nothing to steer by there: that is found "
                "out when a conversation's first prompt is read, with its image. Switch layers "
                "before the prompt."
            )
        return steer_towards(output, state.vector[layer].to(output.device), self.strength)
