"""Key reweighting: attention weights multiplied by one factor per key, made of groups of keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method
from vlm_patch.primitives.buffers import cast

Shares: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From masses `[B, G, H, R]` of key groups `[B, G, K]`, and these groups, to shares
`[B, G, H, R]`."""


def reweight(weights: Tensor, groups: Tensor, shares: Shares) -> Tensor:
    """Weights multiplied by one factor per key, made of groups of keys.

    weights a `[B, H, R, K]`, rows that sum to 1. groups `[B, G, K]`: each key's part in G groups.
    With the masses m_g = sum_k a_k groups_gk and c = shares(m, groups), the new weights are
    a_k sum_g c_g groups_gk.
    """
    groups = cast(groups, weights.dtype)
    if torch.compiler.is_dynamo_compiling():
        return _reweight_fused(weights, groups, shares)
    flat = weights.flatten(1, 2)
    masses = torch.bmm(groups, flat.transpose(1, 2))
    parts = shares(masses.view(*groups.shape[:2], *weights.shape[1:3]), groups)
    factor = torch.bmm(parts.flatten(2).transpose(1, 2), groups)
    # in place where autograd allows it: fresh memory of this size costs more than the product
    return (flat * factor if flat.requires_grad else factor.mul_(flat)).view_as(weights)


def _reweight_fused(weights: Tensor, groups: Tensor, shares: Shares) -> Tensor:
    """`reweight` as products and sums, which torch.compile fuses with what stands around them."""
    wide = groups[:, :, None, None]
    parts = shares((weights[:, None] * wide).sum(-1), groups)
    return weights * (parts[..., None] * wide).sum(1)


@dataclass(frozen=True)
class Formula:
    """`KeyReweighting.shares` for one row, written for Triton.

    function: takes the masses of the four groups, each `[H]`, which of these places are heads, and
        the numbers; returns the four shares, each `[H]`.
    numbers: three of them.
    """

    function: Any
    numbers: tuple[float, float, float]


@dataclass(frozen=True)
class NewKeyGroups:
    """How the groups of a new key follow from the stream entering its block, written for Triton.

    function: takes where the stream lies, whether its token is of an image (1 or 0), its size, then
        the indices, their count and the number below, and two block sizes, those of the stream
        and of the indices; returns the four groups of the key.
    """

    function: Any
    indices: tuple[int, ...]
    number: float


class KeyReweighting(Method, ABC):
    """A method whose edit is one factor per key, made of groups of keys (see `reweight`).

    With four groups, the last of them all keys, it runs on a GPU as one or two small kernels a
    layer. A head that is switched off then has the shares 0, 0, 0, 1. compares_heads: a head's
    shares depend on the masses of the others.
    """

    compares_heads: ClassVar[bool] = False

    @abstractmethod
    def groups(self, layer: int, forward: ForwardContext, state: Any) -> Tensor:
        """The groups `[B, G, K]` of all keys so far, or of more than these."""

    @abstractmethod
    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        """What each group adds to the factor of its keys, `[B, G, H, R]`; see `reweight`.

        groups: of all keys so far; masses lie on those that a sliding window has left.
        """

    def formula(self, heads: int) -> Formula | None:
        """`shares` for Triton, in a layer of so many heads; None: torch works them out."""
        return None

    def new_key_groups(self) -> NewKeyGroups | None:
        """What `observe_hidden` finds, for Triton, if it finds the groups of new keys and nothing
        else; then the kernels write them into `groups`, which `make_room` has made long enough.
        """
        return None

    def make_room(self, layer: int, forward: ForwardContext, state: Any) -> None:
        """Makes the groups of a layer long enough for all keys of `forward`."""

    def edit_weights(
        self, layer: int, weights: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        newest, every = self._newest(weights.shape[-1], layer, forward, state)
        return reweight(weights, newest, lambda masses, _: self.all_shares(masses, every, forward))

    def _newest(
        self, keys: int, layer: int, forward: ForwardContext, state: Any
    ) -> tuple[Tensor, Tensor]:
        """The groups of the newest keys and of all, which are the same object without a window."""
        total = forward.image.shape[1]
        every = self.groups(layer, forward, state).narrow(-1, 0, total)
        if every.device != forward.image.device:
            every = every.to(forward.image.device)
        return every if keys == total else forward.newest(every, keys), every

    def compares_ranks(self, forward: ForwardContext) -> bool:
        """Whether it has to see heads that other processes compute."""
        return self.compares_heads and forward.shard.ranks > 1

    def all_shares(self, masses: Tensor, groups: Tensor, forward: ForwardContext) -> Tensor:
        """`shares`, shown all heads where other processes compute some of them."""
        if not self.compares_ranks(forward):
            return self.shares(masses, groups)
        return forward.shard.mine(self.shares(forward.shard.gather(masses, 2), groups), 2)

    def written_for_triton(self, definition: str, twin: str) -> bool:
        """Whether the class that defines the method `definition` also defines its `twin`: a
        subclass may have replaced the one and not the other.
        """
        names = (vars(kind) for kind in type(self).__mro__)
        return next(twin in own for own in names if definition in own or twin in own)
