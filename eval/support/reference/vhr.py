"""VHR (He et al., arXiv 2412.13949): reinforce the heads whose output depends on the image."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Vhr:
    """Heads are chosen and scaled by alpha in `layers` (0-based)."""

    layers: tuple[int, ...]
    alpha: float = 2.0
    filter: bool = True
    semantics: str = "release"

    name = "vhr"


def divergence(full: Tensor, text: Tensor, semantics: str) -> Tensor:
    """VHD [H]: distance of head outputs [H, d] with and without image; release: squared."""
    squared = (full - text).square().sum(-1)
    return squared if semantics == "release" else squared.sqrt()


def text_activation(text: Tensor) -> Tensor:
    """TA [H]: squared norm of the head outputs [H, d] without image."""
    return text.square().sum(-1)


def outliers(scores: Tensor, activation: Tensor, least_std: float, ddof: int = 1) -> Tensor:
    """bool [H]: heads above mean + std in both; none unless the std of scores > least_std."""
    high_score = scores > scores.mean() + scores.std(correction=ddof)
    high_activation = activation > activation.mean() + activation.std(correction=ddof)
    return high_score & high_activation & (scores.std(correction=ddof) > least_std)


def filtered(scores: Tensor, activation: Tensor, spec: Vhr) -> Tensor:
    """VHD [H] with outliers set to 0; `release` filters only where the std exceeds 1."""
    if not spec.filter:
        return scores
    return scores.masked_fill(outliers(scores, activation, least_std(spec)), 0.0)


def least_std(spec: Vhr) -> float:
    """The release's absolute guard; the paper has none."""
    return 1.0 if spec.semantics == "release" else -torch.inf


def above_median(scores: Tensor) -> Tensor:
    """bool [H]: strictly above the (lower) median of scores [H]."""
    return scores > scores.median()


def scores_of(full: Tensor, text: Tensor, spec: Vhr) -> Tensor:
    """The scores [H] that the heads of one layer are chosen by, from last-row outputs [H, d]."""
    return filtered(divergence(full, text, spec.semantics), text_activation(text), spec)


def reinforced(outputs: Tensor, heads: Tensor, alpha: float) -> Tensor:
    """outputs [H, ...] with those of `heads` (bool [H]) times alpha."""
    factor = torch.where(heads, alpha, 1.0).to(outputs.dtype)
    return outputs * factor.view(-1, *[1] * (outputs.ndim - 1))


def filter_distances(full: Tensor, text: Tensor, spec: Vhr) -> list[Tensor]:
    """How far the filter's three comparisons are from turning; for tests of other code."""
    if not spec.filter:
        return []
    scores, activation = divergence(full, text, spec.semantics), text_activation(text)
    bounds = [(values.mean() + values.std(correction=1)) for values in (scores, activation)]
    spread = scores.std(correction=1) - least_std(spec)
    return [scores - bounds[0], activation - bounds[1], spread]
