"""What methods that act row by row on attention have in common."""

import torch
from torch import Tensor

from eval.support.reference.sample import Sample


class RowMethod:
    """A method that edits single rows of attention in its `layers`; all tensors are float64.

    It edits the scores [H, S] of a row before the softmax, or its weights [H, S] behind it. Keys
    behind the row are out of sight: they have a score, which counts nowhere, and no weight.
    """

    name: str
    layers: tuple[int, ...]

    def rows(self, sample: Sample) -> list[int]:
        """The rows that it edits."""
        return answer_rows(sample)

    def edit_scores(self, layer: int, scores: Tensor, sample: Sample, row: int) -> Tensor:
        return scores

    def edit_weights(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        return weights

    def distances(self, layer: int, weights: Tensor, sample: Sample, row: int) -> Tensor:
        """How far its decisions on weights [H, S] of a row are from turning."""
        return torch.full((len(weights),), torch.inf)


def answer_rows(sample: Sample, prompt: bool = True) -> list[int]:
    """The last row of every turn's prompt, if `prompt`, and the rows of its answer."""
    starts = [turn.start for turn in sample.turns[1:]] + [sample.length]
    rows: list[int] = []
    for turn, stop in zip(sample.turns, starts, strict=True):
        rows += range(turn.end - prompt, stop)
    return rows


def generated_keys(sample: Sample, row: int) -> Tensor:
    """bool [S]: what was generated of the answer that row `row` belongs to, up to that row."""
    end = max(turn.end for turn in sample.turns if turn.end <= row + 1)
    keys = torch.arange(sample.length)
    return (keys >= end) & (keys <= row)


def text_keys(image: Tensor) -> Tensor:
    """bool [S]: what stands behind the first image token and is none itself."""
    found = torch.zeros_like(image)
    seen = False
    for key, is_image in enumerate(image.tolist()):
        seen = seen or is_image
        found[key] = seen and not is_image
    return found
