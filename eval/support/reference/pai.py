"""PAI (Liu et al., arXiv 2407.21771), its attention half: z + alpha |z| on image keys."""

from dataclasses import dataclass

from torch import Tensor

from eval.support.reference.answer import RowMethod, answer_rows
from eval.support.reference.sample import Sample


@dataclass(frozen=True)
class Pai(RowMethod):
    """The last prompt row ("paper") and generated rows."""

    alpha: float
    layers: tuple[int, ...]
    semantics: str = "paper"
    gamma: float = 1.0
    cutoff: float = 0.1

    name = "pai"

    def rows(self, sample: Sample) -> list[int]:
        return answer_rows(sample, prompt=self.semantics == "paper")

    def edit_scores(self, layer: int, scores: Tensor, sample: Sample, row: int) -> Tensor:
        scores = scores.clone()
        for key in sample.image.nonzero().flatten():
            scores[:, key] += self.alpha * scores[:, key].abs()
        return scores
