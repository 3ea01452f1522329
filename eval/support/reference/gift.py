"""GIFT (Qi et al., arXiv 2510.22067): amplify what the gaze shifts to while the query is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gift:
    """saliency_layer gives the map, one layer or several; layers are the enhanced ones; 0-based."""

    alpha: float
    saliency_layer: int | Sequence[int]
    layers: tuple[int, ...]
    beta: float = 1.0
    head_fraction: float = 0.5

    name = "gift"

    @property
    def saliency_layers(self) -> tuple[int, ...]:
        given = self.saliency_layer
        return (given,) if isinstance(given, int) else tuple(given)


def heads_kept(heads: int, fraction: float) -> int:
    return max(1, math.floor(heads * fraction))


def top_heads(score: Tensor, count: int) -> Tensor:
    """bool [H]: the `count` largest of score [H]; ties go to the lowest index."""
    chosen = torch.zeros(len(score), dtype=torch.bool)
    chosen[score.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def positive_change(rows: Tensor) -> Tensor:
    """D [H, R, V] of consecutive rows [H, R + 1, V]: what each row adds to the one before it."""
    return (rows[:, 1:] - rows[:, :-1]).clamp(min=0)


def change_per_head(change: Tensor) -> Tensor:
    """[H]: the total positive change that the map's heads are chosen by."""
    return change.sum((1, 2))


def saliency(change: Tensor, count: int) -> Tensor:
    """S [V]: the mean of change [H, C, V] over the `count` heads that change most, and over C."""
    return change[top_heads(change_per_head(change), count)].mean((0, 1))


def normalised(saliency: Tensor) -> Tensor:
    """S clipped to mean +- 3 sd (unbiased), then stretched to [0, 1]; all 0 where S is flat."""
    if saliency.max() == saliency.min():
        return torch.zeros_like(saliency)
    mean, sd = saliency.mean(), saliency.std(correction=1)
    clipped = saliency.clamp(mean - 3 * sd, mean + 3 * sd)
    return (clipped - clipped.min()) / (clipped.max() - clipped.min())


def words_of_map(query: Tensor, content: Tensor) -> Tensor:
    """bool [S]: C, or all of T where no query token is a content word (decision 5)."""
    words = query & content
    return words if words.any() else query


def shifts(weights: Tensor, image: Tensor, query: Tensor, content: Tensor) -> Tensor:
    """D [H, C, V] from all rows of weights [H, S, S]; row i is compared with position i - 1."""
    rows = weights[:, :, image]
    nothing = torch.zeros_like(rows[:, :1])  # position 0 has no predecessor, and sees no image
    change = torch.cat([nothing, positive_change(rows)], dim=1)
    return change[:, words_of_map(query, content)]


def saliency_map(
    weights: Sequence[Tensor], image: Tensor, query: Tensor, content: Tensor, count: int
) -> Tensor | None:
    """The map [S], 0 off the image, from weights [H, S, S] of every saliency layer: S is the mean
    over the layers, each with heads of its own. None where no query token comes after an image
    token.
    """
    seen = (image.cumsum(0) > 0) & query
    if not seen.any():
        return None
    layers = [saliency(shifts(layer, image, query, content), count) for layer in weights]
    found = torch.zeros(len(image), dtype=weights[0].dtype)
    found[image] = normalised(torch.stack(layers).mean(0))
    return found


@dataclass
class Enhanced:
    """One enhanced row of every head: rows [H, K] after, ratio r, the two head sets bool [H]."""

    rows: Tensor
    ratio: float
    visual_heads: Tensor
    query_heads: Tensor


def visual_boost(rows: Tensor, image: Tensor, gain: Tensor, heads: Tensor) -> Tensor:
    """rows [H, K] with the image weights of `heads` times gain [K]; not yet renormalised."""
    return torch.where(heads[:, None] & image, rows * gain, rows)


def query_boost(rows: Tensor, query: Tensor, factor: float, heads: Tensor) -> Tensor:
    """rows [H, K] with the query weights of `heads` times factor; not yet renormalised."""
    return torch.where(heads[:, None] & query, rows * factor, rows)


def renormalised(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True)


def mass(rows: Tensor, keys: Tensor) -> Tensor:
    return rows[:, keys].sum(-1)


def enhanced(
    rows: Tensor, image: Tensor, query: Tensor, found: Tensor, spec: Gift, count: int
) -> Enhanced:
    """Steps 5 to 8 for one query position: rows [H, K], masks bool [K], map [K]."""
    visual_heads = top_heads(mass(rows, image), count)
    query_heads = top_heads(mass(rows, query), count)
    boosted = visual_boost(rows, image, torch.exp(spec.alpha * found), visual_heads)
    before = mass(rows, image)[visual_heads].sum()
    ratio = float(mass(boosted, image)[visual_heads].sum() / before) if before > 0 else 1.0
    boosted = query_boost(boosted, query, spec.beta * ratio, query_heads)
    return Enhanced(renormalised(boosted), ratio, visual_heads, query_heads)
