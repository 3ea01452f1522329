"""MemVR (Zou et al., arXiv 2410.03577): an unsure layer looks at the image once more."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemVr:
    """In the MLP of the first of `layers` (0-based) that is unsure, by `share`."""

    layers: tuple[int, ...]
    share: float = 0.12
    threshold: float = 0.75

    name = "memvr"


def uncertainty(logits: Tensor) -> Tensor:
    """Of logits [V]: the entropy of the ten largest, over ln 10."""
    largest = sorted(logits.tolist(), reverse=True)[:10]
    weights = [math.exp(value - largest[0]) for value in largest]
    chances = [weight / sum(weights) for weight in weights]
    return torch.tensor(-sum(p * math.log(p) for p in chances if p) / math.log(10))


def mixed(output: Tensor, entering: Tensor, features: Tensor, share: float) -> Tensor:
    """MLP outputs [S, D] of the rows of one forward, which x = entering [S, D] made; features
    [N, D] are the image tokens Z.
    """
    traced = torch.stack([sum((row @ z) * z for z in features) for row in entering])
    size = output.abs().mean() / traced.abs().mean()
    return (1 - share) * output + share * size * traced
