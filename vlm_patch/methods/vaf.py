"""VAF: visual amplification fusion, of "ClearSight". Yin et al., CVPR 2025,
https://arxiv.org/abs/2503.13107.

In the middle layers, where the model mixes image and text, scores of image tokens are amplified and
those of the system prompt are damped.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo, State
from vlm_patch.primitives.key_bias import KeyBias, PerKey, scaled
from vlm_patch.validation import check_number, check_wholes


@dataclass
class SignState(PerKey):
    """negative: by layer, `[B]`, the share of image scores below 0 in the prompt's last rows."""

    negative: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VAF(KeyBias):
    """Multiplies attention scores: those of image tokens by `visual`, those of all keys before the
    image (BOS and system prompt) by `system`, in every row of text behind it (Yin et al.).

    visual, system: the factors; 1 changes nothing.
    layers: where. None: the published ones (9 to 14 of 32), scaled to the depth.

    A negative score goes down where it is multiplied by more than 1: attention falls where it was
    to rise. A warning says so where that is the case for most image tokens, with the first
    generated token that runs uncompiled. The paper restricts the edit to heads that look at the
    image, its code does not; a head table does. Raises ValueError on values out of range.

        wrap(model, VAF(visual=1.15, system=0.95))
    """

    name: ClassVar[str] = "vaf"
    state: ClassVar[type[State]] = SignState
    edits_prompt_end: ClassVar[bool] = False

    visual: float = 1.15
    system: float = 0.95
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_number("VAF visual", self.visual, 0)
        check_number("VAF system", self.system, 0)
        check_wholes("VAF layers", self.layers)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("VAF layers", self.layers)
        if self.layers is not None:
            return self, []
        layers, notes = info.published_layers("VAF", 9, 14)
        return replace(self, layers=layers), notes

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def before_forward(self, forward: ForwardContext, state: SignState) -> None:
        super().before_forward(forward, state)
        if forward.position.starts:
            state.negative.clear()
        elif _may_warn() and state.negative and not forward.position.prompt_rows:
            _warn(state.negative)
            state.negative.clear()

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return None if self.visual == self.system == 1 else forward.text

    def coefficients(self, forward: ForwardContext, dtype: torch.dtype) -> Tensor:
        image = forward.image.to(dtype)
        before = (forward.image.cumsum(1) == 0).to(dtype)
        return (self.visual - 1) * image + (self.system - 1) * before

    def moved(self, scores: Tensor, coefficients: Tensor, forward: ForwardContext) -> Tensor:
        return scaled(scores, coefficients)

    def edit_scores(
        self, layer: int, scores: Tensor, forward: ForwardContext, state: SignState
    ) -> Tensor:
        if forward.position.prompt_rows and self.visual > 1:
            image = forward.newest(forward.image, scores.shape[-1])
            state.negative[layer] = negative_share(scores[:, :, -1].detach(), image)
        return super().edit_scores(layer, scores, forward, state)


def negative_share(scores: Tensor, image: Tensor) -> Tensor:
    """The share of negative ones among the scores `[B, H, K]` of image keys `[B, K]`; `[B]`."""
    found = ((scores < 0) & image[:, None]).sum((1, 2))
    return found / (image.sum(1) * scores.shape[1]).clamp_min(1)


def _may_warn() -> bool:
    """Not in a compiled step, which cannot ask the device for numbers."""
    return not torch.compiler.is_dynamo_compiling()


def _warn(negative: dict[int, Tensor]) -> None:
    shares = {layer: float(found.max()) for layer, found in negative.items()}
    layer = max(shares, key=lambda layer: shares[layer])
    if shares[layer] > 0.5:
        warnings.warn(
            f"VAF multiplies attention scores, and {shares[layer]:.0%} of those of image tokens "
            f"are negative in layer {layer}: there attention to the image falls where it was to "
            "rise. PAI and MassTarget raise it whatever the sign.",
            stacklevel=3,
        )
