"""AD-HH (Yang et al., ICLR 2025): no attention to text where it has tau of it or more."""

from dataclasses import dataclass

from torch import Tensor

from eval.support.reference.answer import RowMethod, text_keys
from eval.support.reference.sample import Sample


@dataclass(frozen=True)
class Adhh(RowMethod):
    """The last prompt row and generated rows, in all heads that the head table leaves on."""

    tau: float
    layers: tuple[int, ...]

    name = "adhh"

    def edit_weights(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        weights, text = weights.clone(), text_keys(sample.image)
        for head in range(len(weights)):
            if weights[head, text].sum() >= self.tau:
                weights[head, text] = 0.0
        return weights

    def distances(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        return weights[:, text_keys(sample.image)].sum(-1) - self.tau
