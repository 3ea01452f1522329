"""MassTarget: a head's attention to the image is set, not scaled. Our own, not from a paper."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, ModelInfo, State
from vlm_patch.primitives.key_bias import PerKey
from vlm_patch.primitives.reweighting import KeyReweighting
from vlm_patch.validation import check_flag, check_number, check_wholes


def target_shares(masses: Tensor, mass: float, raise_only: bool = False) -> Tensor:
    """What sets the attention to a group of keys to `mass`, in proportion within the group and
    within the rest; the same as adding logit(mass) - logit(m) to the group's scores.

    masses m `[B, 3, H, R]`: of the group, of the rest, of all keys. raise_only: leave rows that
    give the group more already. Returns what each adds to the factor of its keys, `[B, 3, H, R]`. A
    row that sees nothing of the group, or nothing else, stays as it is.
    """
    inside, rest, _ = masses.unbind(1)
    tiny = torch.finfo(masses.dtype).tiny
    keep = torch.minimum(inside, rest) < tiny
    if raise_only:
        keep = keep | (inside >= mass)
    set_to = mass / inside.clamp_min(tiny), (1 - mass) / rest.clamp_min(tiny)
    parts = [part.masked_fill(keep, 0.0) for part in set_to]
    return torch.stack((*parts, keep.to(masses.dtype)), 1)


@dataclass(frozen=True)
class MassTarget(KeyReweighting):
    """Sets the share of attention that goes to the image to `mass`, in every head, in the rows that
    predict the answer. Ours, not from a paper.

    mass: the share, above 0 and below 1.
    layers: where. None: all but the first two.
    raise_only: heads that look at the image more than that already keep what they have.

    A boost of scores by a constant saturates heads that look at the image anyway and hardly moves
    those that do not; this one does the same in all of them, in any model. Raises ValueError on
    values out of range.

        wrap(model, MassTarget(mass=0.4))
    """

    name: ClassVar[str] = "mass_target"
    state: ClassVar[type[State]] = PerKey
    edits_prompt_end: ClassVar[bool] = True

    mass: float = 0.4
    layers: Sequence[int] | None = None
    raise_only: bool = False

    def __post_init__(self) -> None:
        check_number("MassTarget mass", self.mass, 0, 1, above=True)
        if self.mass == 1:
            raise ValueError("MassTarget mass: found 1, expected less, so that text is seen at all")
        check_flag("MassTarget raise_only", self.raise_only)
        check_wholes("MassTarget layers", self.layers)

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        info.check_layers("MassTarget layers", self.layers)
        if self.layers is not None:
            return self, []
        return replace(self, layers=info.layers_from(2)), []

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def before_forward(self, forward: ForwardContext, state: PerKey) -> None:
        image = forward.image
        state.values = torch.stack((image, ~image, torch.ones_like(image)), 1).float()

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.answer_rows()

    def groups(self, layer: int, forward: ForwardContext, state: PerKey) -> Tensor:
        found: Tensor = state.values
        return found

    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        return target_shares(masses, self.mass, self.raise_only)
