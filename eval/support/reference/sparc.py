"""SPARC (Jung et al., arXiv 2502.01419): values of image keys grow when attention to them rises."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.support.reference.answer import RowMethod, answer_rows
from eval.support.reference.sample import Sample


@dataclass(frozen=True)
class Sparc(RowMethod):
    """`layer` is looked at, values are scaled in `layers`."""

    alpha: float
    tau: float
    beta: float
    layer: int
    layers: tuple[int, ...]

    name = "sparc"


class Unrolled(RowMethod):
    """Sparc on one sample, of which it learns one row after the other, a pass of the model each.

    gains [S, S]: by which row i multiplies what it takes from key j. looked: by row, the attention
    [row + 1] that it saw in the layer, as the methods before left it.
    """

    def __init__(self, spec: Sparc, sample: Sample) -> None:
        self.spec, self.name = spec, spec.name
        self.layers = (*{*spec.layers, spec.layer},)
        self.gains = torch.ones(sample.length + 1, sample.length + 1, dtype=torch.float64)
        self.count = torch.zeros(sample.length, dtype=torch.float64)
        self.mean = torch.zeros(sample.length, dtype=torch.float64)
        self.looked: dict[int, Tensor] = {}

    def rows(self, sample: Sample) -> list[int]:
        return answer_rows(sample)

    def edit_weights(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        if layer == self.spec.layer:
            self.looked[row] = weights.mean(0)
        if layer not in self.spec.layers:
            return weights
        return weights * self.gains[row, : weights.shape[1]]

    def learn(self, row: int, image: Tensor, first: bool) -> Tensor:
        """What row `row` picks for the rows behind it; returns distances from the threshold."""
        seen = torch.zeros_like(self.mean)
        seen[: row + 1] = self.looked[row][: row + 1]
        gaps = torch.full((1,), torch.inf)
        if first:
            self.count.zero_()
            self.mean = seen
        else:
            rise = (seen - self.mean) / self.mean
            self.count += (image & (rise >= self.spec.tau)).double()
            gaps = (rise - self.spec.tau)[image]
            self.mean = (1 - self.spec.beta) * seen + self.spec.beta * self.mean
        self.gains[row + 1, :-1] = self.spec.alpha**self.count
        return gaps
