"""Devils in the Middle Layers (Jiang et al., arXiv 2411.16724): z + alpha mean_h |z_h|."""

from dataclasses import dataclass

from torch import Tensor

from eval.support.reference.answer import RowMethod
from eval.support.reference.sample import Sample


@dataclass(frozen=True)
class MiddleLayers(RowMethod):
    """The last prompt row and generated rows."""

    alpha: float
    layers: tuple[int, ...]

    name = "devils"

    def edit_scores(self, layer: int, scores: Tensor, sample: Sample, row: int) -> Tensor:
        moved = scores.clone()
        for key in sample.image.nonzero().flatten():
            moved[:, key] += self.alpha * scores[:, key].abs().sum() / len(scores)
        return moved
