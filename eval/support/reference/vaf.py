"""VAF, ClearSight (Yin et al., arXiv 2503.13107): scores of image keys times `visual`, of keys
before the image times `system`."""

from dataclasses import dataclass

from torch import Tensor

from eval.support.reference.answer import RowMethod, text_keys
from eval.support.reference.sample import Sample


@dataclass(frozen=True)
class Vaf(RowMethod):
    """All text rows behind the first image token."""

    visual: float
    system: float
    layers: tuple[int, ...]

    name = "vaf"

    def rows(self, sample: Sample) -> list[int]:
        rows: list[int] = text_keys(sample.image).nonzero().flatten().tolist()
        return rows

    def edit_scores(self, layer: int, scores: Tensor, sample: Sample, row: int) -> Tensor:
        scores = scores.clone()
        scores[:, sample.image] *= self.visual
        scores[:, : int(sample.image.nonzero()[0])] *= self.system
        return scores
