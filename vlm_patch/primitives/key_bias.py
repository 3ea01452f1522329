"""Key bias: attention scores moved by one coefficient per key times a size, such as their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.method import ForwardContext, Method, State


def biased(scores: Tensor, coefficients: Tensor, size: Tensor) -> Tensor:
    """z + c s for scores z `[B, H, R, K]`; coefficients c, size s: broadcastable to them."""
    return scores.addcmul(coefficients, size)


def raised(scores: Tensor, coefficients: Tensor) -> Tensor:
    """z + c |z|: up for all, but negative ones never past 0, as long as c is 0 to 1."""
    return biased(scores, coefficients, scores.abs())


def scaled(scores: Tensor, coefficients: Tensor) -> Tensor:
    """z + c z, which is (1 + c) z: away from 0, so that negative ones go down where c > 0."""
    return biased(scores, coefficients, scores)


@dataclass
class PerKey(State):
    """values: `[B, ..., K]`, of all keys so far, made anew in every forward."""

    per_forward: ClassVar[tuple[str, ...]] = ("values",)

    values: Any = None


class KeyBias(Method, ABC):
    """A method that moves scores by one coefficient per key, the same in all its layers and heads,
    times a size.
    """

    state: ClassVar[type[State]] = PerKey

    @abstractmethod
    def coefficients(self, forward: ForwardContext, dtype: torch.dtype) -> Tensor:
        """One number for each key so far, `[B, K]`."""

    @abstractmethod
    def moved(self, scores: Tensor, coefficients: Tensor, forward: ForwardContext) -> Tensor:
        """New scores `[B, H, R, K]`; coefficients `[B, 1, 1, K]`."""

    def before_forward(self, forward: ForwardContext, state: Any) -> None:
        state.values = None

    def edit_scores(
        self, layer: int, scores: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        known = state.values
        if known is None or known.device != scores.device:
            known = state.values = self.coefficients(forward, scores.dtype)
        return self.moved(scores, forward.newest(known, scores.shape[-1])[:, None, None], forward)
