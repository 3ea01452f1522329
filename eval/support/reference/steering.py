"""A vector of one's own on the residual stream (Turner et al., arXiv 2308.10248)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.support.reference.sample import Turn


@dataclass(frozen=True)
class Steering:
    """vectors [D] by layer (0-based), times strength, behind "all", "last" or "generated" rows."""

    vectors: Mapping[int, Tensor]
    strength: float = 1.0
    positions: str = "all"

    name = "steering"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.vectors)


def rows(spec: Steering, turns: tuple[Turn, ...], length: int) -> Tensor:
    """bool [S]: which rows are steered."""
    steered = torch.ones(length, dtype=torch.bool)
    if spec.positions != "all":
        for turn in turns:
            steered[turn.start : turn.end] = False
            steered[turn.end - 1] = spec.positions == "last"
    return steered


def edited(hidden: Tensor, steered: Tensor, spec: Steering, layer: int) -> Tensor:
    """hidden [S, D] leaving a block, row by row."""
    hidden = hidden.clone()
    for row in range(len(hidden)):
        if steered[row]:
            hidden[row] = hidden[row] + spec.strength * spec.vectors[layer].double()
    return hidden
