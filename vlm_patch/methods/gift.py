"""GIFT: gaze shift-guided fusion enhancement. Qi et al., ICML 2026,
https://arxiv.org/abs/2510.22067.

Where the model's gaze on the image moves while it reads the question, it looks harder while it
answers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_patch.errors import PatchError
from vlm_patch.method import (
    Facts,
    Forward,
    Memory,
    Method,
    Regrouping,
    append,
    check_number,
    check_wholes,
    reweigh,
)
from vlm_patch.methods import looped
from vlm_patch.primitives import dispatch, launch

MOST_ALPHA = 80.0


def positive_change(weights: Tensor) -> Tensor:
    """D[i, j] = max(a[i, j] - a[i-1, j], 0) for consecutive rows `[..., R, K]`; returns `[..., R-1,
    K]`.
    """
    return weights.diff(dim=-2).clamp_min(0)


def rows_before(content: Tensor, valid: Tensor) -> Tensor:
    """The last rows before content rows that are no padding, `[B, S]`; content, valid `[B, S]`."""
    places = torch.arange(1, valid.shape[1] + 1, device=valid.device)
    known = pad((places * valid).cummax(1).values[:, :-1], (1, 0))  # 0: there is none here
    marks = torch.zeros_like(pad(content, (1, 0)))
    return marks.scatter_(1, known * content, True)[:, 1:]


def without_padding(weights: Tensor, valid: Tensor) -> Tensor:
    """Rows `[B, H, R, K]` with those of padding replaced by the row before them; valid `[B, R]`."""
    if valid.all():
        return weights
    places = torch.arange(valid.shape[1], device=valid.device)
    known = (places * valid).cummax(1).values[:, None, :, None]
    return weights.gather(2, known.expand_as(weights))


def how_many(heads: int, fraction: float) -> int:
    """floor(fraction * H), at least one."""
    return max(1, math.floor(fraction * heads))


def top_heads(mass: Tensor, fraction: float = 0.5, dim: int = -1) -> Tensor:
    """The floor(fraction * H) heads with the largest mass, at least one; ties to the lowest index.

    mass: heads along `dim`. Returns a bool tensor of the same shape.
    """
    count = how_many(mass.shape[dim], fraction)
    order = mass.argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, count)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(dim, order, True)


def saliency_gain(saliency: Tensor, image: Tensor, alpha: float) -> Tensor:
    """g[j] = exp(alpha * S^[j]): the map clipped to mean +- 3 sd over the image tokens, then scaled
    to [0, 1].

    saliency, image (bool) `[..., K]`; sd has divisor n - 1. Returns `[..., K]` in [1, e^alpha]; 1
    outside the image and everywhere for a flat map.
    """
    count = image.sum(-1, keepdim=True)
    mean = (saliency * image).sum(-1, keepdim=True) / count.clamp_min(1)
    square = ((saliency - mean).square() * image).sum(-1, keepdim=True)
    sd = (square / (count - 1).clamp_min(1)).sqrt()
    clipped = saliency.clamp(mean - 3 * sd, mean + 3 * sd)
    low = clipped.masked_fill(~image, math.inf).amin(-1, keepdim=True)
    high = clipped.masked_fill(~image, -math.inf).amax(-1, keepdim=True)
    flat = ~image | (high <= low)
    scaled = ((clipped - low) / (high - low)).masked_fill(flat, 0.0)
    return (alpha * scaled).exp()


def key_groups(image: Tensor, query: Tensor, gain: Tensor) -> Tensor:
    """Image keys, what the gain adds on them, query keys and all keys, `[B, 4, K]` in the gain's
    dtype.

    image, query `[B, K]` (bool); gain `[B, K]`.
    """
    everything = torch.ones_like(gain)
    return torch.stack(
        (image.to(gain.dtype), (gain - 1) * image, query.to(gain.dtype), everything), 1
    )


def gaze_shares(masses: Tensor, beta: float = 1.0, head_fraction: float = 0.5) -> Tensor:
    """How the image and the question of a row are reweighed (paper, section 3).

    masses `[B, 4, H, R]`: attention to the groups of `key_groups`. In the heads with the largest
    image mass the image weights are multiplied by the gain; r is the pooled ratio of new to old
    image mass of these heads, one number per row; in the heads with the largest query mass the
    query weights are multiplied by beta * r; then every edited row is divided by its sum. Returns
    what each group adds to the factor of its keys, `[B, 4, H, R]`.
    """
    looking, reading = top_heads(masses[:, :3:2], head_fraction, dim=2).to(masses.dtype).unbind(1)
    mass, more = (masses[:, :2] * looking[:, None]).sum(2, keepdim=True).unbind(1)
    pace = more / mass.clamp_min(torch.finfo(masses.dtype).tiny)  # r - 1
    if beta != 1:
        pace = beta * pace + (beta - 1)
    pace = reading * pace
    one = torch.ones_like(pace)
    total = (one + looking * masses[:, 1] + pace * masses[:, 2])[:, None]
    shares = torch.stack((torch.zeros_like(one), looking, pace, one), 1)
    empty = total <= 0
    shares = (shares / total).masked_fill(empty, 0.0)
    shares[:, 3:] += empty
    return shares


def amplify(
    weights: Tensor, groups: Tensor, beta: float = 1.0, head_fraction: float = 0.5
) -> Tensor:
    """Sharpens the gaze by the map and lets the question keep pace with it.

    weights `[B, H, R, K]`: attention after the softmax. groups `[B, 4, K]`: see `key_groups`. beta,
    head_fraction: see `gaze_shares`.
    """
    return reweigh(weights, groups, lambda m, _: gaze_shares(m, beta, head_fraction))


def _say_blind(blind: Tensor) -> None:
    warnings.warn(
        f"GIFT leaves {int(blind.sum())} of {len(blind)} prompts as they are: the question stands "
        "before the image (or there is none), so no gaze can shift over the image. Put the image "
        "first.",
        stacklevel=3,
    )


@dataclass(frozen=True, eq=False)
class GIFT(Regrouping):
    """Looks harder, while answering, at what the question made the model look at.

    alpha: strength; 0 changes nothing; None for the published value. beta: how far the question
    keeps pace with the image, 1 fully. saliency_layer: where the gaze is read, a layer or a list of
    them. Several make one map as in the release: each layer chooses its own heads, and the map is
    the mean over layers, chosen heads and content words. layers: where the gaze is enhanced. None
    for the published ones, or the layer below the middle third and the middle third.
    head_fraction: share of heads taken in each choice. words: "content" (the question without
    English function words), "spacy" (nouns, verbs, adjectives, adverbs, numbers by spaCy's
    en_core_web_sm), "all", or a bool mask `[batch, prompt length]`. Raises ValueError on values out
    of range.
    """

    name: ClassVar[str] = "gift"
    reads_question: ClassVar[bool] = True
    edits_prompt_end: ClassVar[bool] = True
    compares_heads: ClassVar[bool] = True

    alpha: float | None = None
    beta: float = 1.0
    saliency_layer: int | Sequence[int] | None = None
    layers: Sequence[int] | None = None
    head_fraction: float = 0.5
    words: str | Tensor = "content"

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_number("GIFT alpha", self.alpha)
            if self.alpha > MOST_ALPHA:
                raise ValueError(
                    f"GIFT alpha: found {self.alpha!r}, expected at most {MOST_ALPHA:g}, since "
                    "e^alpha must fit into float32 (published values are 4 and 5)"
                )
        check_number("GIFT beta", self.beta, 0)
        check_number("GIFT head_fraction", self.head_fraction, 0, 1)
        if self.saliency_layer is not None:
            _check_saliency_layer(self.saliency_layer)
        check_wholes("GIFT layers", self.layers)
        if isinstance(self.words, Tensor):
            if self.words.dtype != torch.bool or self.words.ndim != 2:
                raise ValueError(
                    f"GIFT words: found {self.words.dtype} of shape {tuple(self.words.shape)}, "
                    "expected a bool mask [batch, prompt length]"
                )
        elif self.words not in ("content", "spacy", "all"):
            raise ValueError(
                f'GIFT words: found {self.words!r}, expected "content", "spacy", "all" or a mask'
            )

    @property
    def saliency_layers(self) -> tuple[int, ...]:
        """The layers where the gaze is read, one or several."""
        given = self.saliency_layer
        return (given or 0,) if isinstance(given, int | None) else tuple(given)

    def fit(self, facts: Facts) -> tuple[Method, list[str]]:
        third = max(1, facts.depth // 3)
        layers = facts.acting(range(third, max(third + 1, 2 * third)))
        below = [layer for layer in facts.acting(range(facts.depth)) if layer < layers[0]]
        scaled = {
            "alpha": 4.0,
            "layers": layers,
            "saliency_layer": below[-1] if below else layers[0],
        }
        missing = [name for name in scaled if getattr(self, name) is None]
        notes = [f"GIFT {name}={scaled[name]}" for name in missing if name not in facts.profile]
        fitted = replace(self, **{n: facts.profile.get(n, scaled[n]) for n in missing})
        facts.check_layers("GIFT saliency_layer", fitted.saliency_layers)
        facts.check_layers("GIFT layers", fitted.layers)
        return fitted, notes

    def own_layers(self, depth: int) -> list[int]:
        return list(self.layers or ())

    def begin(self, forward: Forward, memory: Memory) -> None:
        if not forward.reading:
            if ("blind", 0) in memory and not forward.prompt:
                _say_blind(memory.pop(("blind", 0)))
            if ("read", 0) not in memory:
                raise PatchError(
                    "gift is on, but was off when the prompt was read, so it has no map. Switch it "
                    "on before the prompt."
                )
            if forward.image.shape[1] > forward.past and ("groups", 0) in memory:
                nothing = torch.zeros_like(memory["groups", 0][..., :1])
                nothing[:, 3] = 1
                rows = forward.image.shape[1] - forward.past
                append(memory, ("groups", 0), nothing.expand(-1, -1, rows), forward.past)
            return
        if forward.starts:
            edges = {key[1]: edge for key, edge in memory.items() if key[0] == "edge"}
            if forward.resumed and not edges and forward.image[:, : forward.past].any():
                raise PatchError(
                    "gift is on, but was off when the beginning of this prompt was read, with its "
                    "image. Switch it on before the prompt."
                )
            memory.clear()
            memory["read", 0] = forward.seen
            if forward.resumed:
                for layer, edge in edges.items():
                    memory["edge", layer] = memory["row before", layer] = edge
        blind = forward.seen & ~forward.query.any(1)
        if forward.ends and blind.any():
            if forward.open:  # the question may follow
                memory["blind", 0] = blind
            else:
                _say_blind(blind)

    def edited(self, forward: Forward) -> Tensor | None:
        return forward.last & (forward.seen & forward.query.any(1))[:, None]

    def watched(self, forward: Forward) -> tuple[Sequence[int], Tensor] | None:
        """Rows of content words and the rows before them, which may end the forward before."""
        if not forward.reading:
            return None
        content = forward.content[:, forward.new]
        before = rows_before(content, forward.valid)
        if not forward.ends:
            before[:, -1] = True
        if forward.edge is not None:  # the row before the question, if that comes later
            before[:, forward.edge] = True
        return self.saliency_layers, content | before

    def observe(
        self, layer: int, weights: Tensor, rows: Tensor, forward: Forward, memory: Memory
    ) -> None:
        """Adds up the positive change of the content rows per head and key; may be called in chunks
        of rows, and in several forwards.
        """
        keys = forward.image.shape[1]
        # keys out of a sliding window have no weight; to autograd the map is a constant
        weights = pad(weights.detach(), (keys - weights.shape[-1], 0))
        edge = rows == (-1 if forward.edge is None else forward.edge)
        if forward.edge is not None and edge.any():
            memory["edge", layer] = weights[:, :, edge]
        before = memory.get(("row before", layer))
        valid = forward.valid[:, rows]
        if before is not None:
            weights = torch.cat((pad(before, (0, keys - before.shape[-1])), weights), 2)
            valid = pad(valid, (1, 0), value=True)
        else:
            rows = rows[1:]
        weights = without_padding(weights, valid)
        memory["row before", layer] = weights[:, :, -1:]
        # two watched rows in sequence are neighbours wherever the later one is a content row with a
        # row before it
        content = forward.content[:, forward.new][:, rows]
        change = positive_change(weights) * content[:, None, :, None]
        change = change.sum(2) * forward.image[:, None]
        total = memory.get(("change", layer))
        if total is not None:
            change = change + pad(total, (0, keys - total.shape[-1]))
        memory["change", layer] = change

    def groups(self, layer: int, forward: Forward, memory: Memory) -> Tensor:
        """The same in every layer; the map is made when it is first asked for."""
        if ("groups", 0) not in memory:
            maps = [self._layer_map(each, forward, memory) for each in self.saliency_layers]
            # the sum in place of the mean: the gain is the same for a map of any scale
            gain = saliency_gain(torch.stack(maps).sum(0), forward.image, self.alpha or 0.0)
            append(memory, ("groups", 0), key_groups(forward.image, forward.query, gain), 0)
        return memory["groups", 0]

    def _layer_map(self, layer: int, forward: Forward, memory: Memory) -> Tensor:
        """What the gaze shifted to in one layer, `[B, K]`: the change of the heads that change
        most there, added up.
        """
        if ("change", layer) not in memory:
            raise PatchError(
                f"gift has no map: no attention was seen in its saliency_layer {layer}, which has "
                "no softmax attention on this model"
            )
        change = forward.shard.gather(memory.pop(("change", layer)), 1).to(forward.image.device)
        memory.pop(("row before", layer), None)
        kept = top_heads(change.sum(-1), self.head_fraction)
        return pad(
            (change * kept[..., None]).sum(1), (0, forward.image.shape[1] - change.shape[-1])
        )

    def row(self, weights: Tensor, groups: Tensor) -> Tensor:
        count = how_many(weights.shape[1], self.head_fraction)
        return looped.gaze_row(weights, groups, self.beta, count)

    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        heads, beta, fraction = masses.shape[2], self.beta, self.head_fraction
        if masses.shape[3] > 1 or not dispatch.possible(masses.device.type):
            return gaze_shares(masses, beta, fraction)
        return dispatch.tried(
            ("gaze shares", str(masses.device), heads),
            lambda: launch.gaze_shares(masses, beta, how_many(heads, fraction)),
            lambda: gaze_shares(masses, beta, fraction),
        )


def _check_saliency_layer(given: Any) -> None:
    """Raises ValueError unless it is a layer or a list of different ones."""
    layers = given if isinstance(given, list | tuple | range) else [given]
    check_wholes("GIFT saliency_layer", layers)
    if not layers or len({*layers}) < len(layers):
        raise ValueError(
            f"GIFT saliency_layer: found {given!r}, expected a layer, or a list of at least one "
            "layer with none of them twice"
        )
