"""GIFT: gaze shift-guided fusion enhancement. Qi et al., ICML 2026,
https://arxiv.org/abs/2510.22067.

Where the model's gaze on the image moves while it reads the question, it looks harder while it
answers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_patch.errors import PatchError
from vlm_patch.method import (
    ForwardContext,
    Method,
    ModelInfo,
    State,
)
from vlm_patch.primitives.buffers import append
from vlm_patch.primitives.reweighting import Formula, KeyReweighting, reweight
from vlm_patch.primitives.triton import jit, tl
from vlm_patch.validation import check_number, check_wholes

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


@jit
def top_of_a_row(mass: tl.tensor, inside: tl.tensor, count: tl.tensor) -> Any:
    """`top_heads`: 1 for the `count` heads with the largest mass, else 0; `[H]`."""
    head = tl.arange(0, mass.shape[0])
    mass = tl.where(inside, mass, -1.0)
    larger = mass[None, :] > mass[:, None]
    earlier = (mass[None, :] == mass[:, None]) & (head[None, :] < head[:, None])
    rank = tl.sum((larger | earlier).to(tl.int32), 1)
    return tl.where(rank < count, 1.0, 0.0)


@jit
def gaze_shares_of_a_row(
    image: tl.tensor,
    gain: tl.tensor,
    query: tl.tensor,
    every: tl.tensor,
    inside: tl.tensor,
    beta: tl.tensor,
    count: tl.tensor,
    unused: tl.tensor,
) -> Any:
    """`gaze_shares` of one row; masses `[H]`."""
    looking = top_of_a_row(image, inside, count)
    mass, gained = tl.sum(looking * image, 0), tl.sum(looking * gain, 0)
    more = gained / tl.maximum(mass, 1.1754943508222875e-38)
    pace = top_of_a_row(query, inside, count) * (beta * more + (beta - 1))
    total = 1 + looking * gain + pace * query
    left = total > 0
    divisor = tl.where(left, total, 1.0)
    kept = tl.where(left, 1.0 / divisor, 0.0)
    return tl.zeros_like(kept), kept * looking, kept * pace, 1.0 / divisor


def amplify(
    weights: Tensor, groups: Tensor, beta: float = 1.0, head_fraction: float = 0.5
) -> Tensor:
    """Sharpens the gaze by the map and lets the question keep pace with it.

    weights `[B, H, R, K]`: attention after the softmax. groups `[B, 4, K]`: see `key_groups`. beta,
    head_fraction: see `gaze_shares`.
    """
    return reweight(weights, groups, lambda m, _: gaze_shares(m, beta, head_fraction))


def _say_blind(blind: Tensor) -> None:
    warnings.warn(
        f"GIFT leaves {int(blind.sum())} of {len(blind)} prompts as they are: the question stands "
        "before the image (or there is none), so no gaze can shift over the image. Put the image "
        "first.",
        stacklevel=3,
    )


@dataclass
class GazeState(State):
    """What GIFT remembers of a generation, by layer where the gaze is read.

    read: `[B]`, samples with an image; None before a prompt.
    blind: `[B]`, samples without a question behind the image, to be said if none follows.
    edge, row_before: `[B, H, 1, K]`, weights of the last image row, of the row watched last.
    change: `[B, H, K]`, positive changes of the content rows, added up.
    groups: `[B, 4, at least K]`, see `key_groups`, once the map is made.
    """

    per_key: ClassVar[tuple[str, ...]] = ("edge", "row_before", "change", "groups")

    read: Tensor | None = None
    blind: Tensor | None = None
    edge: dict[int, Tensor] = field(default_factory=dict)
    row_before: dict[int, Tensor] = field(default_factory=dict)
    change: dict[int, Tensor] = field(default_factory=dict)
    groups: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GIFT(KeyReweighting):
    """Amplifies, while the response is written, the image tokens to which attention shifts while
    the question is read (Qi et al., section 3).

    alpha: strength; 0 changes nothing, at most 80. None: the published value, or 4.
    beta: how far attention to the question keeps pace with the image, 1 fully.
    saliency_layer: index of the layer where the shift is read, or a list of them. Several make one
        map as in the release: each layer chooses its own heads, and the map is the mean over
        layers, chosen heads and content words. None: the published one, or the layer below
        `layers`.
    layers: where attention is amplified. None: the published ones, or the middle third.
    head_fraction: share of heads taken in each choice, 0 to 1.
    words: "content" (the question without English function words), "spacy" (nouns, verbs,
        adjectives, adverbs, numbers by spaCy's en_core_web_sm), "all", or a bool mask `[batch,
        prompt length]`.

    Raises ValueError on values out of range.

        wrap(model, GIFT(alpha=5.0, saliency_layer=[9, 11]), processor=processor)
    """

    name: ClassVar[str] = "gift"
    state: ClassVar[type[State]] = GazeState
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

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        third = max(1, info.depth // 3)
        layers = info.acting(range(third, max(third + 1, 2 * third)))
        below = [layer for layer in info.acting(range(info.depth)) if layer < layers[0]]
        scaled = {
            "alpha": 4.0,
            "layers": layers,
            "saliency_layer": below[-1] if below else layers[0],
        }
        missing = [name for name in scaled if getattr(self, name) is None]
        notes = [f"GIFT {name}={scaled[name]}" for name in missing if name not in info.profile]
        fitted = replace(self, **{n: info.profile.get(n, scaled[n]) for n in missing})
        info.check_layers("GIFT saliency_layer", fitted.saliency_layers)
        info.check_layers("GIFT layers", fitted.layers)
        return fitted, notes

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def before_forward(self, forward: ForwardContext, state: GazeState) -> None:
        at = forward.position
        if not forward.reading:
            if state.blind is not None and not at.prompt_rows:
                _say_blind(state.blind)
                state.blind = None
            if state.read is None:
                raise PatchError(
                    "gift is on, but was off when the prompt was read, so it has no map. Switch it "
                    "on before the prompt."
                )
            if state.groups is not None:
                nothing = torch.zeros_like(state.groups[..., :1])
                nothing[:, 3] = 1
                nothing = nothing.expand(-1, -1, forward.valid.shape[1])
                state.groups = _longer(state.groups, nothing, at.past)
            return
        if at.starts:
            edges = state.edge
            if at.resumed and not edges and forward.image[:, : at.past].any():
                raise PatchError(
                    "gift is on, but was off when the beginning of this prompt was read, with its "
                    "image. Switch it on before the prompt."
                )
            state.clear()
            state.read = forward.seen
            if at.resumed:
                state.edge, state.row_before = edges, dict(edges)
        blind = forward.seen & ~forward.query.any(1)
        if at.ends and blind.any():
            if at.may_continue:  # the question may follow
                state.blind = blind
            else:
                _say_blind(blind)

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        return forward.last & (forward.seen & forward.query.any(1))[:, None]

    def watched_rows(self, forward: ForwardContext) -> tuple[Sequence[int], Tensor] | None:
        """Rows of content words and the rows before them, which may end the forward before."""
        at = forward.position
        if not forward.reading:
            return None
        content = forward.content[:, forward.new]
        before = rows_before(content, forward.valid)
        if not at.ends:
            before[:, -1] = True
        if at.last_image_row is not None:  # the row before the question, if that comes later
            before[:, at.last_image_row] = True
        return self.saliency_layers, content | before

    def observe(
        self, layer: int, weights: Tensor, rows: Tensor, forward: ForwardContext, state: GazeState
    ) -> None:
        """Adds up the positive change of the content rows per head and key; may be called in chunks
        of rows, and in several forwards.
        """
        at, keys = forward.position, forward.image.shape[1]
        # keys out of a sliding window have no weight; to autograd the map is a constant
        weights = pad(weights.detach(), (keys - weights.shape[-1], 0))
        edge = rows == (-1 if at.last_image_row is None else at.last_image_row)
        if at.last_image_row is not None and edge.any():
            state.edge[layer] = weights[:, :, edge]
        before = state.row_before.get(layer)
        valid = forward.valid[:, rows]
        if before is not None:
            weights = torch.cat((pad(before, (0, keys - before.shape[-1])), weights), 2)
            valid = pad(valid, (1, 0), value=True)
        else:
            rows = rows[1:]
        weights = without_padding(weights, valid)
        state.row_before[layer] = weights[:, :, -1:]
        # two watched rows in sequence are neighbours wherever the later one is a content row with a
        # row before it
        content = forward.content[:, forward.new][:, rows]
        change = positive_change(weights) * content[:, None, :, None]
        change = change.sum(2) * forward.image[:, None]
        total = state.change.get(layer)
        if total is not None:
            change = change + pad(total, (0, keys - total.shape[-1]))
        state.change[layer] = change

    def groups(self, layer: int, forward: ForwardContext, state: GazeState) -> Tensor:
        """The same in every layer; the map is made when it is first asked for."""
        if state.groups is None:
            maps = [self._layer_map(each, forward, state) for each in self.saliency_layers]
            # the sum in place of the mean: the gain is the same for a map of any scale
            gain = saliency_gain(torch.stack(maps).sum(0), forward.image, self.alpha or 0.0)
            groups = key_groups(forward.image, forward.query, gain)
            state.groups = _longer(state.groups, groups, 0)
        return state.groups

    def _layer_map(self, layer: int, forward: ForwardContext, state: GazeState) -> Tensor:
        """What the gaze shifted to in one layer, `[B, K]`: the change of the heads that change
        most there, added up.
        """
        if layer not in state.change:
            raise PatchError(
                f"gift has no map: no attention was seen in its saliency_layer {layer}, which has "
                "no softmax attention on this model"
            )
        change = forward.shard.gather(state.change.pop(layer), 1).to(forward.image.device)
        state.row_before.pop(layer, None)
        kept = top_heads(change.sum(-1), self.head_fraction)
        return pad(
            (change * kept[..., None]).sum(1), (0, forward.image.shape[1] - change.shape[-1])
        )

    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        return gaze_shares(masses, self.beta, self.head_fraction)

    def formula(self, heads: int) -> Formula | None:
        numbers = self.beta, float(how_many(heads, self.head_fraction)), 0.0
        return Formula(gaze_shares_of_a_row, numbers)


def _longer(groups: Tensor | None, new: Tensor, past: Any) -> Tensor:
    """`append`, where a key that is read while GIFT is off is one of all keys too."""
    longer = append(groups, new, past)
    if longer is not groups:
        longer[:, 3] = 1
    return longer


def _check_saliency_layer(given: Any) -> None:
    """Raises ValueError unless it is a layer or a list of different ones."""
    layers = given if isinstance(given, list | tuple | range) else [given]
    check_wholes("GIFT saliency_layer", layers)
    if not layers or len({*layers}) < len(layers):
        raise ValueError(
            f"GIFT saliency_layer: found {given!r}, expected a layer, or a list of at least one "
            "layer with none of them twice"
        )
