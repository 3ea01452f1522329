"""Nullu (Yang et al., arXiv 2412.13817): weights W become (I - V V^T) W."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nullu:
    """directions [r, D] by layer (0-based), of which the first `rank` count."""

    directions: Mapping[int, Tensor]
    rank: int | None = None

    name = "nullu"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.directions)


def projection(spec: Nullu, layer: int) -> Tensor:
    """I - V V^T [D, D], one direction after the other."""
    directions = spec.directions[layer][: spec.rank].double()
    kept = torch.eye(directions.shape[1], dtype=torch.float64)
    for direction in directions:
        kept = kept - torch.outer(direction, direction)
    return kept


def edited(output: Tensor, spec: Nullu, layer: int) -> Tensor:
    """What an MLP whose last weights are projected gives instead of output [S, D]."""
    return torch.stack([projection(spec, layer) @ row for row in output])
