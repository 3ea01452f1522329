"""Key reweighting: attention weights multiplied by one factor per key, made of groups of keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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


class KeyReweighting(Method, ABC):
    """A method whose edit is one factor per key, made of groups of keys (see `reweight`).

    Whatever has this form runs as two small kernels at a generated token on a GPU. compares_heads:
    a head's shares depend on the masses of the others.
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

    def parts(
        self, keys: int, layer: int, forward: ForwardContext, state: Any
    ) -> tuple[Tensor, Shares]:
        """The groups `[B, G, keys]` of the newest keys, which are those that a sliding window has
        left, and the shares by masses on them.
        """
        newest, every = self._newest(keys, layer, forward, state)
        return newest, self._shares_by(newest, every, forward)

    def edit_weights(
        self, layer: int, weights: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        newest, every = self._newest(weights.shape[-1], layer, forward, state)
        return reweight(weights, newest, self._shares_by(newest, every, forward))

    def _newest(
        self, keys: int, layer: int, forward: ForwardContext, state: Any
    ) -> tuple[Tensor, Tensor]:
        """The groups of the newest keys and of all, which are the same object without a window."""
        total = forward.image.shape[1]
        every = self.groups(layer, forward, state).narrow(-1, 0, total)
        if every.device != forward.image.device:
            every = every.to(forward.image.device)
        return every if keys == total else forward.newest(every, keys), every

    def _sees_all(self, forward: ForwardContext) -> bool:
        """Whether all heads that it has to see are computed here."""
        return forward.shard.ranks == 1 or not self.compares_heads

    def _shares_by(self, newest: Tensor, every: Tensor, forward: ForwardContext) -> Shares:
        """`_shares_in` by masses on the newest keys, but shown the groups of all."""
        shares = self._shares_in(forward)
        return shares if newest is every else lambda masses, _: shares(masses, every)

    def _shares_in(self, forward: ForwardContext) -> Shares:
        """`shares`, shown all heads where other processes compute some of them."""
        shard = forward.shard
        if self._sees_all(forward):
            return self.shares
        return lambda m, groups: shard.mine(self.shares(shard.gather(m, 2), groups), 2)
