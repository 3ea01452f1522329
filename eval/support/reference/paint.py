"""PAINT (Arif et al., arXiv 2501.12206): raise the scores of patches the vision tower looks at."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Paint:
    """The last prompt row ("paper") and generated rows of `layers` (0-based)."""

    alpha: float
    beta: float
    rho: float
    layers: tuple[int, ...]
    semantics: str = "paper"
    rho_sp: float = 0.0
    sensitivity: Sequence[Sequence[float]] | None = None
    gamma: float = 1.0
    cutoff: float = 0.1

    name = "paint"


@dataclass(frozen=True)
class Picture:
    """The patches of one image: positions [T] in the sample, scores [T] in float64."""

    places: Tensor
    local: Tensor
    summary: Tensor
    spatial: Tensor


def pictures(
    model: nn.Module, caught: Mapping[nn.Module, Any], places: Tensor
) -> tuple[Picture, ...]:
    """Of a prompt with image tokens at `places`, from what entered the attention of each layer of
    the tower."""
    layers = list(caught)
    if not layers:
        return ()
    maps = [_maps(layer, *caught[layer]) for layer in (layers[0], layers[-2])]
    cls = "class_embedding" in str([name for name, _ in model.named_parameters()])
    found = []
    for first, last in zip(*maps, strict=True):
        block = first[:, 1:, 1:] if cls else first
        read = [m[:, 0, 1:].sum(0) if cls else m.mean(1).sum(0) for m in (first, last)]
        read.append(block.mean(0).sum(0))
        if not cls:  # a token is a square of four
            read = [scores.view(-1, 4).mean(1) for scores in read]
        found.append(Picture(places[: len(read[0])], *read))
        places = places[len(read[0]) :]
    assert not len(places)
    return tuple(found)


def _maps(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The attention [heads, S, S] of a layer in every image, in float64."""
    x = (args[0] if args else kwargs["hidden_states"]).double()
    if hasattr(layer, "qkv"):
        qkv = functional.linear(x, layer.qkv.weight.double(), layer.qkv.bias.double())
        q, k, _ = qkv.view(len(x), 3, layer.num_heads, -1).permute(1, 2, 0, 3)
        cos, sin = (part.double() for part in kwargs["position_embeddings"])
        q, k = (part * cos + _turned(part) * sin for part in (q, k))
        ends = kwargs["cu_seqlens"].tolist()
        spans = list(itertools.pairwise(ends))
        pairs = [(q[:, start:end], k[:, start:end]) for start, end in spans]
    else:
        q, k = (
            torch.unflatten(
                functional.linear(x, part.weight.double(), part.bias.double()),
                -1,
                (layer.num_heads, -1),
            ).transpose(1, 2)
            for part in (layer.q_proj, layer.k_proj)
        )
        pairs = list(zip(q, k, strict=True))
    return [(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) for q, k in pairs]


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def largest(scores: Tensor, share: float) -> set[int]:
    """The indices of the floor(share * N) largest; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return set(order[: math.floor(round(share * len(scores), 9))])


def threshold(scores: Tensor) -> float:
    """Q3 + 1.5 (Q3 - Q1), linear between the two nearest."""
    ordered = sorted(scores.tolist())

    def quartile(part: float) -> float:
        place = part * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    q1, q3 = quartile(0.25), quartile(0.75)
    return q3 + 1.5 * (q3 - q1)


def sets(local: Tensor, summary: Tensor, spatial: Tensor, spec: Paint) -> tuple[set[int], set[int]]:
    """L and S of one image, as indices of its patches."""
    strong = {i for i, score in enumerate(summary.tolist()) if score > threshold(summary)}
    return (largest(local, spec.rho) | largest(spatial, spec.rho_sp)) - strong, strong


def coefficients(found: Sequence[Picture], image: Tensor, spec: Paint) -> Tensor:
    """c [S]: alpha on L, beta on S, else 0; patches that `image` [S] leaves out do not count."""
    c = torch.zeros(len(image), dtype=torch.float64)
    for picture in found:
        kept = image[picture.places]
        parts = (picture.local, picture.summary, picture.spatial)
        patches, summary, spatial = (part[kept] for part in parts)
        local, strong = sets(patches, summary, spatial, spec)
        for index, place in enumerate(picture.places[kept].tolist()):
            c[place] = spec.alpha if index in local else spec.beta if index in strong else 0.0
    return c


def distances(found: Sequence[Picture], image: Tensor, spec: Paint) -> list[Tensor]:
    """How far the choices are from turning; for tests of other code."""
    gaps = []
    for picture in found:
        kept = image[picture.places]
        summary = picture.summary[kept]
        gaps.append(summary - threshold(summary))
        for scores, share in ((picture.local, spec.rho), (picture.spatial, spec.rho_sp)):
            ordered = scores[kept].sort(descending=True).values
            count = math.floor(round(share * len(ordered), 9))
            if 0 < count < len(ordered):
                gaps.append(ordered[count - 1 : count] - ordered[count : count + 1])
    return gaps


def raised(scores: Tensor, c: Tensor) -> Tensor:
    """z + c |z| of scores [..., S]."""
    return scores + c * scores.abs()


def head_factors(spec: Paint, layer: int, heads: int) -> Tensor:
    """[H]: by how much each head takes part."""
    if spec.sensitivity is None:
        return torch.ones(heads, dtype=torch.float64)
    table = torch.tensor(spec.sensitivity, dtype=torch.float64)
    return table[layer] / table.max()
