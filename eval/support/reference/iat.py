"""IAT and AdaIAT (arXiv 2603.04908): more attention to the tokens generated so far."""

from dataclasses import dataclass

from torch import Tensor

from eval.support.reference.answer import RowMethod, answer_rows, generated_keys
from eval.support.reference.sample import Sample


@dataclass(frozen=True)
class Iat(RowMethod):
    """z + alpha |z| on generated keys, in generated rows."""

    alpha: float
    layers: tuple[int, ...]

    name = "iat"

    def rows(self, sample: Sample) -> list[int]:
        return answer_rows(sample, prompt=False)

    def edit_scores(self, layer: int, scores: Tensor, sample: Sample, row: int) -> Tensor:
        scores = scores.clone()
        for key in generated_keys(sample, row).nonzero().flatten():
            scores[:, key] += self.alpha * scores[:, key].abs()
        return scores


@dataclass(frozen=True)
class AdaIat(RowMethod):
    """real, hallucinated [layers][heads]: the mean weight on a generated key at such objects."""

    real: tuple[tuple[float, ...], ...]
    hallucinated: tuple[tuple[float, ...], ...]
    alpha: float
    beta: float
    layers: tuple[int, ...]

    name = "adaiat"

    def rows(self, sample: Sample) -> list[int]:
        return answer_rows(sample, prompt=False)

    def threshold(self, layer: int) -> float:
        low, high = sum(self.hallucinated[layer]), sum(self.real[layer])
        return low + self.beta * (high - low)

    def edit_weights(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        keys = generated_keys(sample, row)
        if weights[:, keys].mean(1).sum() >= self.threshold(layer):
            return weights
        weights = weights.clone()
        for head in range(len(weights)):
            ratio = self.real[layer][head] / self.hallucinated[layer][head]
            weights[head, keys] *= max(0.0, 1 + self.alpha * (ratio - 1))
        return weights / weights.sum(1, keepdim=True)

    def distances(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        looked = weights[:, generated_keys(sample, row)].mean(1).sum()
        return (looked - self.threshold(layer))[None]
