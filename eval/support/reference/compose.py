"""Methods together: edits of scores in the order given, one softmax, edits of weights in the same
order, then the values, then VHR's scale; behind the MLP edits of its output, and behind the block
edits of the residual stream, in the order given too; behind the head edits of logits, in order
again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from eval.support.reference import (
    decoder,
    gift,
    memvr,
    nullu,
    paint,
    steering,
    streams,
    var,
    vhr,
    vista,
)
from eval.support.reference.answer import RowMethod
from eval.support.reference.decoder import (
    HiddenEdit,
    MlpEdit,
    OutputsEdit,
    Run,
    ScoresEdit,
    WeightsEdit,
)
from eval.support.reference.gift import Gift
from eval.support.reference.memvr import MemVr
from eval.support.reference.nullu import Nullu
from eval.support.reference.paint import Paint
from eval.support.reference.sample import Sample, Turn
from eval.support.reference.sparc import Sparc, Unrolled
from eval.support.reference.steering import Steering
from eval.support.reference.streams import Deco, Dola, Icd, M3id, Vcd
from eval.support.reference.var import Var
from eval.support.reference.vhr import Vhr
from eval.support.reference.vista import Vista

OnLogits = Vcd | Icd | M3id | Dola | Deco
Method = Var | Gift | Vhr | Paint | RowMethod | Steering | Nullu | Vista | MemVr | OnLogits
Heads = Mapping[str, Tensor]


@dataclass
class Trace:
    """Everything a failing comparison may want to look at. Keys of dictionaries are layers.

    run: decoder.Run of the final pass (logits, block inputs, weights, outputs).
    phi [S], sinks bool [S], selected bool [H, S], image_mass [H, S]: VAR.
    gaze: the weights [H, S, S] that GIFT met, as the methods listed before it left them.
    maps: one per turn, [turn end] or None. enhanced: by (layer, row).
    scores [H], chosen bool [H]: VHR.
    margins: by decision, the smallest distance of any compared number from its threshold; where
    one is within float32 rounding, another implementation may rightly decide otherwise.
    """

    run: Run = field(default_factory=Run)
    phi: dict[int, Tensor] = field(default_factory=dict)
    sinks: dict[int, Tensor] = field(default_factory=dict)
    selected: dict[int, Tensor] = field(default_factory=dict)
    image_mass: dict[int, Tensor] = field(default_factory=dict)
    gaze: dict[int, Tensor] = field(default_factory=dict)
    maps: list[Tensor | None] = field(default_factory=list)
    enhanced: dict[tuple[int, int], gift.Enhanced] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)

    def near(self, decision: str, distances: Tensor) -> None:
        """Remember the smallest absolute distance from a threshold."""
        finite = distances.abs()[distances.isfinite()]
        if len(finite):
            known = self.margins.get(decision, torch.inf)
            self.margins[decision] = min(known, float(finite.min()))


def logits(
    model: Any, sample: Sample, methods: Sequence[Method] = (), heads: Heads | None = None
) -> Tensor:
    """[S, vocabulary] in float64; row i predicts the token at i + 1.

    heads: bool [layers, heads] by method name; a head that is off keeps what it had, but counts
    in every choice. A sample without an image is stock.
    """
    return trace(model, sample, methods, heads).run.logits


def trace(
    model: Any, sample: Sample, methods: Sequence[Method] = (), heads: Heads | None = None
) -> Trace:
    """The same, with everything that was seen and decided on the way.

    Each turn's map comes from a pass that ends with its question: GIFT acts on the turns before
    it and is off in this one, every other method acts.
    """
    if not sample.image.any():
        return Trace(run=forward(model, sample.embeds, sample.positions))
    text = text_outputs(model, sample) if any(isinstance(m, Vhr) for m in methods) else []
    added = image_vectors(model, sample) if any(isinstance(m, Vista) for m in methods) else []
    maps: list[Tensor | None] = []
    margins: list[dict[str, float]] = []
    methods = [Unrolled(m, sample) if isinstance(m, Sparc) else m for m in methods]
    starts = [turn.start for turn in sample.turns[1:]] + [sample.length]
    for turn, stop in zip(sample.turns, starts, strict=True):
        for spec in [method for method in methods if isinstance(method, Gift)]:
            part = sample.until(turn.end)
            first = _Pass(model, part, methods, heads or {}, maps, text, added).go()
            maps = [*maps, _map(first, spec, turn, sample.image[: turn.end])]
            margins.append(first.margins)
        for run in [method for method in methods if isinstance(method, Unrolled)]:
            for row in range(turn.end - 1, stop):
                part = replace(sample.until(row + 1), rounded=sample.rounded)
                seen = _Pass(model, part, methods, heads or {}, maps, text, added).go()
                seen.near("sparc rise", run.learn(row, sample.image, row == turn.end - 1))
                margins.append(seen.margins)
    final = _Pass(model, sample, methods, heads or {}, maps, text, added).go()
    for known in margins:
        for decision, distance in known.items():
            final.near(decision, torch.tensor(distance))
    off = {name for name, table in (heads or {}).items() if not table.any()}
    for method in [method for method in methods if method.name not in off]:
        final.run.logits = streams.edited(model, sample, method, final.run, final.near)
    return final


def forward(
    model: Any,
    embeds: Tensor,
    positions: Tensor,
    edit_weights: WeightsEdit = lambda layer, block_input, weights: weights,
    edit_outputs: OutputsEdit = lambda layer, outputs: outputs,
    from_cache: decoder.FromCache = decoder.as_they_are,
    edit_scores: ScoresEdit = lambda layer, scores: scores,
    edit_mlp: MlpEdit = lambda layer, entering, output: output,
    edit_hidden: HiddenEdit = lambda layer, hidden: hidden,
) -> Run:
    """One pass of the literal decoder, or of a model that runs its own layers (with a cache without
    loss and without edits of scores and of the residual stream).
    """
    edits = edit_weights, edit_outputs
    if hasattr(model, "run"):
        own: Run = model.run(embeds, *edits)
        return own
    residual = edit_mlp, edit_hidden
    return decoder.forward(model, embeds, positions, *edits, from_cache, edit_scores, *residual)


def sinks(model: Any, sample: Sample, dims: tuple[int, ...], tau: float) -> Tensor:
    """bool [layers, S]: the sinks (paper semantics) that the stock model's block inputs show."""
    run = forward(model, sample.embeds, sample.positions)
    return torch.stack([var.phi(x, dims) >= tau for x in run.block_inputs])


def text_outputs(model: Any, sample: Sample) -> list[Tensor]:
    """VHR's look: per layer the stock head outputs [H, d] of the first prompt's last row, the
    image tokens deleted and the positions counted anew from 0."""
    return [outputs[:, -1] for outputs in _text_only(model, sample).outputs]


def _text_only(model: Any, sample: Sample) -> Run:
    """The stock model on the first prompt without its image tokens."""
    prompt = sample.until(sample.turns[0].end)
    embeds = prompt.embeds[~prompt.image]
    positions = torch.arange(len(embeds)).expand(*prompt.positions.shape[:-1], -1)
    return forward(model, embeds, positions)


def image_vectors(model: Any, sample: Sample) -> list[Tensor]:
    """VISTA's look: per layer what the image adds [D] to the residual stream leaving it, in the
    first prompt's last row."""
    prompt = sample.until(sample.turns[0].end)
    whole = forward(model, prompt.embeds, prompt.positions)
    pairs = zip(whole.block_outputs, _text_only(model, sample).block_outputs, strict=True)
    return [with_image[-1] - text[-1] for with_image, text in pairs]


def _map(first: Trace, spec: Gift, turn: Turn, image: Tensor) -> Tensor | None:
    weights = [first.gaze[layer] for layer in spec.saliency_layers]
    count = gift.heads_kept(len(weights[0]), spec.head_fraction)
    for layer in weights if turn.query.any() else ():
        change = gift.change_per_head(gift.shifts(layer, image, turn.query, turn.content))
        first.near("gift map heads", _gap(change, count))
    return gift.saliency_map(weights, image, turn.query, turn.content, count)


def _gap(score: Tensor, count: int) -> Tensor:
    """Between the last chosen and the first rejected head; infinite where all are chosen."""
    order = score.sort(descending=True).values
    return order[count - 1] - order[count] if count < len(order) else torch.tensor(torch.inf)


@dataclass
class _Pass:
    """One forward with the methods on; GIFT acts in the turns that have a map."""

    model: Any
    sample: Sample
    methods: Sequence[Method]
    heads: Heads
    maps: Sequence[Tensor | None]
    text: Sequence[Tensor]
    added: Sequence[Tensor]
    seen: Trace = field(default_factory=Trace)
    looked: set[int] = field(default_factory=set)
    block_input: Tensor = field(default_factory=lambda: torch.empty(0))

    def go(self) -> Trace:
        self.seen.maps = list(self.maps)
        embeds, positions = self.sample.embeds, self.sample.positions
        self.seen.run = forward(
            self.model,
            embeds,
            positions,
            self._edit_weights,
            self._edit_outputs,
            self._from_cache,
            self._edit_scores,
            self._edit_mlp,
            self._edit_hidden,
        )
        return self.seen

    def _from_cache(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys or values [groups, S, d] as a lossy cache gives them back, and the rows bool [S]
        that see them so.
        """
        end = self.sample.turns[0].end
        rows = torch.arange(self.sample.length) >= end
        if self.sample.rounded is None:
            return states, rows
        return self.sample.rounded(states, end), rows

    def _edit_scores(self, layer: int, scores: Tensor) -> Tensor:
        for method in self.methods:
            if isinstance(method, Paint) and layer in method.layers:
                edited = self._paint(method, layer, scores)
                scores = self._where_on(method, layer, edited, scores)
            elif isinstance(method, RowMethod) and layer in method.layers:
                edited = scores.clone()
                for row in method.rows(self.sample):
                    edited[:, row] = method.edit_scores(layer, scores[:, row], self.sample, row)
                scores = self._where_on(method, layer, edited, scores)
        return scores

    def _row_weights(self, method: RowMethod, layer: int, weights: Tensor) -> Tensor:
        edited = weights.clone()
        for row in method.rows(self.sample):
            gaps = method.distances(layer, weights[:, row], self.sample, row)
            self.seen.near(method.name, gaps)
            edited[:, row] = method.edit_weights(layer, weights[:, row], self.sample, row)
        return edited

    def _paint(self, spec: Paint, layer: int, scores: Tensor) -> Tensor:
        """The last prompt row (not in the release) and the generated rows of every turn."""
        pictures, image = self.sample.pictures, self.sample.image
        c = paint.coefficients(pictures, image, spec)
        for gap in paint.distances(pictures, image, spec):
            self.seen.near("paint sets", gap)
        factors = paint.head_factors(spec, layer, len(scores))
        scores = scores.clone()
        starts = [turn.start for turn in self.sample.turns[1:]] + [self.sample.length]
        for turn, stop in zip(self.sample.turns, starts, strict=True):
            for row in range(turn.end - (spec.semantics == "paper"), stop):
                scores[:, row] = paint.raised(scores[:, row], factors[:, None] * c)
        return scores

    def _edit_weights(self, layer: int, block_input: Tensor, weights: Tensor) -> Tensor:
        self.block_input = block_input
        for method in self.methods:
            edited = weights
            if isinstance(method, Var):
                edited = self._var(method, layer, block_input, weights)
            elif isinstance(method, Gift):
                self.seen.gaze[layer] = weights
                edited = self._gift(method, layer, weights)
            elif isinstance(method, RowMethod) and layer in method.layers:
                edited = self._row_weights(method, layer, weights)
            weights = self._where_on(method, layer, edited, weights)
        return weights

    def _edit_outputs(self, layer: int, outputs: Tensor) -> Tensor:
        for method in self.methods:
            if isinstance(method, Vhr) and layer in method.layers:
                edited = self._vhr(method, layer, outputs)
                outputs = self._where_on(method, layer, edited, outputs)
        return outputs

    def _edit_mlp(self, layer: int, entering: Tensor, output: Tensor) -> Tensor:
        for method in self.methods:
            if not self._is_on(method, layer):
                continue
            if isinstance(method, Nullu) and layer in method.layers:
                output = nullu.edited(output, method, layer)
            elif isinstance(method, Vista) and layer in method.layers:
                output = vista.edited(output, self.added[layer], method.strength)
            elif isinstance(method, MemVr) and layer in method.layers:
                output = self._memvr(method, entering, output)
        return output

    def _memvr(self, spec: MemVr, entering: Tensor, output: Tensor) -> Tensor:
        """Every prompt, and every generated token, whose last row is unsure for the first time."""
        output = output.clone()
        for start, end in self._forwards():
            last = self.block_input[end - 1]
            unsure = memvr.uncertainty(decoder.readout(self.model, last))
            self.seen.near("memvr uncertainty", unsure - spec.threshold)
            if unsure > spec.threshold and start not in self.looked:
                self.looked.add(start)
                features = self.sample.embeds[:end][self.sample.image[:end]]
                rows = slice(start, end)
                output[rows] = memvr.mixed(output[rows], entering[rows], features, spec.share)
        return output

    def _forwards(self) -> list[tuple[int, int]]:
        """The rows that a cache lets run at once: those of a prompt, and one a generated token."""
        prompts = [(turn.start, turn.end) for turn in self.sample.turns]
        read = {row for start, end in prompts for row in range(start, end)}
        return prompts + [(row, row + 1) for row in range(self.sample.length) if row not in read]

    def _edit_hidden(self, layer: int, hidden: Tensor) -> Tensor:
        for method in self.methods:
            if (
                isinstance(method, Steering)
                and layer in method.layers
                and self._is_on(method, layer)
            ):
                rows = steering.rows(method, self.sample.turns, self.sample.length)
                hidden = steering.edited(hidden, rows, method, layer)
        return hidden

    def _is_on(self, method: Method, layer: int) -> bool:
        """Whether the table leaves a layer on, as methods without heads ask."""
        table = self.heads.get(method.name)
        return table is None or bool(table[layer].all())

    def _where_on(self, method: Method, layer: int, edited: Tensor, before: Tensor) -> Tensor:
        """edited [H, ...] in the heads that the table leaves on, before in the others."""
        table = self.heads.get(method.name)
        if table is None:
            return edited
        return torch.where(table[layer][:, None, None], edited, before)

    def _var(self, spec: Var, layer: int, block_input: Tensor, weights: Tensor) -> Tensor:
        """Text rows after the first image token, redistributed."""
        seen, image = self.seen, self.sample.image
        if not spec.acts_in(layer, self.model.config.text_config.num_hidden_layers):
            return weights
        tested = torch.ones_like(image)
        if spec.semantics == "release":  # frozen at the first prefill
            tested[self.sample.turns[0].end :] = False
        eps = 1e-6 if spec.semantics == "release" else 0.0
        sinks = var.is_sink(block_input, spec, tested)
        rows = ~image & (image.cumsum(0) > 0)
        ratio = 1 - var.sink_ratio(weights, image, sinks, spec.semantics)
        seen.phi[layer] = var.phi(block_input, spec.dims, eps)
        seen.sinks[layer] = sinks
        seen.image_mass[layer] = var.image_mass(weights, image)
        seen.selected[layer] = var.selected(weights, image, sinks, spec) & rows
        seen.near("var phi", seen.phi[layer] - spec.tau)
        seen.near("var image mass", (seen.image_mass[layer] - spec.min_image_mass)[:, rows])
        seen.near("var ratio", (ratio - spec.rho_nonsink)[:, rows])
        edited = var.redistributed(weights, image, sinks, spec)
        return torch.where(rows[:, None], edited, weights)

    def _gift(self, spec: Gift, layer: int, weights: Tensor) -> Tensor:
        """The last prompt row and the generated rows of every turn that has a map."""
        if layer not in spec.layers:
            return weights
        weights = weights.clone()
        starts = [turn.start for turn in self.sample.turns[1:]] + [self.sample.length]
        for turn, found, stop in zip(self.sample.turns, self.maps, starts, strict=False):
            if found is not None:
                for row in range(turn.end - 1, stop):
                    weights[:, row] = self._enhanced_row(spec, layer, row, turn, found, weights)
        return weights

    def _enhanced_row(
        self, spec: Gift, layer: int, row: int, turn: Turn, found: Tensor, weights: Tensor
    ) -> Tensor:
        query = self._over_all_keys(turn.query)
        count = gift.heads_kept(weights.shape[0], spec.head_fraction)
        rows, image = weights[:, row], self.sample.image
        self.seen.near("gift visual heads", _gap(gift.mass(rows, image), count))
        self.seen.near("gift query heads", _gap(gift.mass(rows, query), count))
        result = gift.enhanced(rows, image, query, self._over_all_keys(found), spec, count)
        self.seen.enhanced[layer, row] = result
        return result.rows

    def _over_all_keys(self, mask: Tensor) -> Tensor:
        """[S] from what covers the keys up to a turn's end; 0 behind."""
        whole = torch.zeros(self.sample.length, dtype=mask.dtype)
        whole[: len(mask)] = mask
        return whole

    def _vhr(self, spec: Vhr, layer: int, outputs: Tensor) -> Tensor:
        """Every row, in the heads that the first prompt's last row chooses."""
        last = self.sample.turns[0].end - 1
        scores = vhr.scores_of(outputs[:, last], self.text[layer], spec)
        for distances in vhr.filter_distances(outputs[:, last], self.text[layer], spec):
            self.seen.near("vhr filter", distances)
        self.seen.scores[layer] = scores
        self.seen.chosen[layer] = vhr.above_median(scores)
        distances = (scores - scores.median())[scores != scores.median()]
        self.seen.near("vhr median", distances)
        return vhr.reinforced(outputs, self.seen.chosen[layer], spec.alpha)
