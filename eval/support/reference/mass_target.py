"""MassTarget, our own: logit(m*) - logit(m) is added to the scores of all image keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.support.reference.answer import RowMethod
from eval.support.reference.sample import Sample


@dataclass(frozen=True)
class Mass(RowMethod):
    """The last prompt row and generated rows. raise_only: not where m is m* or more."""

    mass: float
    layers: tuple[int, ...]
    raise_only: bool = False

    name = "mass_target"

    def edit_weights(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        weights = weights.clone()
        for head, before in enumerate(weights.clone()):
            m = before[sample.image].sum()
            others = before[~sample.image].sum()
            if m == 0 or others == 0 or (self.raise_only and m >= self.mass):
                continue
            bias = torch.logit(torch.tensor(self.mass, dtype=torch.float64)) - (m / others).log()
            weights[head] = (before.log() + bias * sample.image).softmax(-1)
        return weights

    def distances(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        if not self.raise_only:
            return super().distances(layer, weights, sample, row)
        return weights[:, sample.image].sum(-1) - self.mass
