"""VISTA (Li et al., arXiv 2502.03628): MLP outputs turned towards what the image adds."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Vista:
    """In `layers` (0-based), by lambda = strength."""

    layers: tuple[int, ...]
    strength: float = 0.17

    name = "vista"


def unit(vector: Tensor) -> Tensor:
    found: Tensor = vector / vector.norm()
    return found


def turned(output: Tensor, vector: Tensor, strength: float) -> Tensor:
    """One row m [D] by v [D]."""
    cosine = output @ -vector / (output.norm() * vector.norm())
    push = strength * (1 + max(0.0, float(cosine)))
    found: Tensor = output.norm() * unit(unit(output) + push * unit(vector))
    return found


def edited(output: Tensor, vector: Tensor, strength: float) -> Tensor:
    """MLP output [S, D], row by row."""
    return torch.stack([turned(row, vector, strength) for row in output])
