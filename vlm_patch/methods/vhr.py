"""VHR: vision-aware head reinforcement. He et al., ACL 2025, https://arxiv.org/abs/2412.13949.

Heads whose output changes most when the image is taken away are made louder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.errors import PatchError
from vlm_patch.method import (
    Facts,
    Forward,
    Memory,
    Method,
    StockPass,
    Watcher,
    check_flag,
    check_number,
    check_wholes,
)


def divergence(with_image: Tensor, text_only: Tensor, squared: bool) -> Tensor:
    """Vision-aware head divergence (paper, section 3): how far the image moves each head's output.

    with_image, text_only `[..., H, Dv]`: outputs of the last row before the output projection.
    Returns `[..., H]`: the Euclidean distance, or its square.
    """
    square = (with_image - text_only).square().sum(-1)
    return square if squared else square.sqrt()


def drop_outliers(scores: Tensor, text_only: Tensor, guard: float | None) -> Tensor:
    """Scores `[..., H]` with 0 for heads that are large by far both in divergence and in text-only
    output.

    text_only `[..., H, Dv]`. Both must exceed mean + standard deviation (divisor H - 1) over the
    heads of the layer. guard: do nothing in a layer where the standard deviation of the scores does
    not exceed it; None for no guard.
    """
    strength = text_only.square().sum(-1)
    outlier = (scores > scores.mean(-1, keepdim=True) + scores.std(-1, keepdim=True)) & (
        strength > strength.mean(-1, keepdim=True) + strength.std(-1, keepdim=True)
    )
    if guard is not None:
        outlier &= scores.std(-1, keepdim=True) > guard
    return scores.masked_fill(outlier, 0.0)


def above_median(scores: Tensor) -> Tensor:
    """The heads `[..., H]` (bool) that score strictly above the median of their layer."""
    return scores > scores.median(-1, keepdim=True).values


PER_TOKEN = ("inputs_embeds", "input_ids", "per_layer_inputs")
"""Decoder inputs `[B, S, ...]` that a prompt without its image keeps."""


def without_image(forward: Forward) -> dict[str, Any]:
    """The decoder inputs of a prompt with its image tokens deleted, left-padded, positions
    re-packed from 0.

    Returns inputs_embeds `[B, T, D]` (or what else stands for the tokens), attention_mask `[B, T]`,
    position_ids `[B, T]`, T the longest text of the batch. The mask is `[B, 1, T, T]` where text
    looks ahead (PaliGemma's prefix), which the decoder would not do by itself.
    """
    keep = (forward.valid & ~forward.image[:, forward.new])[:, : forward.prompt]
    length = max(1, int(keep.sum(1).max()))
    order = keep.long().argsort(dim=1, stable=True)[:, -length:]
    samples = torch.arange(len(order), device=order.device)[:, None]
    mask = keep.gather(1, order)
    tokens = {name: forward.inputs.get(name) for name in PER_TOKEN}
    return {
        **{name: value[samples, order] for name, value in tokens.items() if value is not None},
        "attention_mask": _text_mask(forward.inputs.get("attention_mask"), order, mask),
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }


def distinct(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Decoder inputs without the samples that equal the one before, and which of those left stands
    for each sample, `[B]`.

    Beams are equal, and so are the texts of pictures that are all asked the same.
    """
    new = torch.ones_like(inputs["position_ids"][:, 0], dtype=torch.bool)
    if isinstance(inputs["attention_mask"], Mapping):
        return inputs, new.cumsum(0) - 1
    differ = [(value[1:] != value[:-1]).flatten(1).any(1) for value in inputs.values()]
    new[1:] = torch.stack(differ).any(0)
    return {name: value[new] for name, value in inputs.items()}, new.cumsum(0) - 1


def _text_mask(given: Any, order: Tensor, valid: Tensor) -> Any:
    """The mask of the text alone, made from the prompt's if text looks ahead in that.

    order, valid `[B, T]`: the text tokens, and which of them are no padding.
    """
    masks = given if isinstance(given, Mapping) else {"": given}
    cut = {kind: _text_rows(mask, order) for kind, mask in masks.items()}
    both = valid[:, None, :] & valid[:, :, None]
    if not any(seen is not None and (seen & both).triu(1).any() for seen in cut.values()):
        return valid.long()
    # padding sees everything, since a row that sees nothing would become NaN
    own = {
        kind: None if seen is None else (seen & valid[:, None] | ~valid[:, :, None])[:, None]
        for kind, seen in cut.items()
    }
    return own if isinstance(given, Mapping) else own[""]


def _text_rows(mask: Any, order: Tensor) -> Tensor | None:
    """What the text sees of the text `[B, T, T]` in a ready mask `[B, 1, S, K]`."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    samples = torch.arange(len(order), device=order.device)[:, None, None]
    seen = mask.expand(len(order), *mask.shape[1:])[
        samples, 0, order[:, :, None], order[:, None, :]
    ]
    return seen if seen.dtype == torch.bool else seen == 0


@dataclass(frozen=True)
class VHR(Method):
    """Doubles the heads whose output depends most on the image, chosen once per prompt.

    alpha: gain of the chosen heads; 1 changes nothing. layers: where; None for the published ones,
    or those scaled to the depth (the second layer and the last 14 of 32). filter: leave out heads
    that are outliers without the image too. semantics: "release" (squared distance; the filter only
    where the scores spread by more than 1) or "paper". Raises ValueError on values out of range.
    """

    name: ClassVar[str] = "vhr"

    alpha: float = 2.0
    layers: Sequence[int] | None = None
    filter: bool = True
    semantics: str = "release"

    def __post_init__(self) -> None:
        check_flag("VHR filter", self.filter)
        check_number("VHR alpha", self.alpha)
        check_wholes("VHR layers", self.layers)
        if self.semantics not in ("release", "paper"):
            raise ValueError(
                f'VHR semantics: found {self.semantics!r}, expected "release" or "paper"'
            )

    def fit(self, facts: Facts) -> tuple[Method, list[str]]:
        if self.layers is not None:
            facts.check_layers("VHR layers", self.layers)
            return self, []
        if "layers" in facts.profile:
            return replace(self, layers=tuple(facts.profile["layers"])), []
        last = max(1, round(facts.depth * 14 / 32))
        second, ending = min(1, facts.depth - 1), range(facts.depth - last, facts.depth)
        layers = facts.acting(sorted({second, *ending}))
        return replace(self, layers=layers), [f"VHR layers={list(layers)}"]

    def own_layers(self, depth: int) -> list[int]:
        return list(self.layers or ())

    def settles(self, forward: Forward) -> bool:
        return forward.first and forward.prompt > 0

    def look(self, forward: Forward, memory: Memory, layers: list[int], run: StockPass) -> Method:
        """The text-only pass: keeps the last row's head outputs of every layer that is on."""
        if not forward.first:
            return self
        if forward.resumed:
            raise PatchError(
                "vhr chooses its heads by the last row of the prompt and makes them louder in all "
                f"rows before it, of which {forward.past} are cached already: give the whole "
                "prompt, with its image, without a cache, or generate inside "
                '`with patch.disabled("vhr"):` (before a new turn, feed the answer token by token)'
            )
        if not forward.ends:
            raise PatchError(
                "vhr chooses its heads by the last row of the prompt and makes them louder in all "
                "rows before it, so a prompt cannot be read in chunks: leave prefill_chunk_size "
                'out, or generate inside `with patch.disabled("vhr"):`'
            )
        memory.clear()
        inputs, place = distinct(without_image(forward))

        def keep(layer: int, output: Tensor) -> None:
            if layer in layers:
                memory["text", layer] = output[:, -1].index_select(0, place.to(output.device))

        run(inputs, Watcher(heads=keep))
        return self

    def begin(self, forward: Forward, memory: Memory) -> None:
        """Heads are chosen anew by every pass over the first prompt, and kept from then on."""
        if self.settles(forward):
            for key in [key for key in memory if key[0] == "gain"]:
                del memory[key]
        elif forward.starts and forward.image[:, forward.new].any():
            warnings.warn(
                "VHR keeps the heads that it chose at the conversation's first prompt, also for "
                "the image of this later turn. For heads of its own, give that turn without a "
                "cache.",
                stacklevel=2,
            )

    def output_gain(
        self, layer: int, output: Tensor, forward: Forward, memory: Memory
    ) -> Tensor | None:
        gain = memory.get(("gain", layer))
        if gain is None:
            if ("text", layer) not in memory:
                raise PatchError(
                    f"vhr is on in layer {layer}, but chose no heads there: they are chosen when "
                    "a conversation's first prompt is read, with its image. Switch layers before "
                    "the prompt."
                )
            outputs = output[:, forward.prompt - 1].detach(), memory["text", layer]
            chosen = self.choose(*(forward.shard.gather(heads, 1) for heads in outputs))
            chosen = forward.shard.mine(chosen, 1)
            gain = torch.where(chosen & forward.seen[:, None], self.alpha, 1.0)
            memory["gain", layer] = gain
        return gain

    def choose(self, with_image: Tensor, text_only: Tensor) -> Tensor:
        """The heads `[B, H]` to reinforce, from last-row outputs `[B, H, Dv]` with and without the
        image.
        """
        dtype = torch.promote_types(with_image.dtype, torch.float32)
        with_image, text_only = with_image.to(dtype), text_only.to(dtype)
        scores = divergence(with_image, text_only, squared=self.semantics == "release")
        if self.filter:
            scores = drop_outliers(scores, text_only, 1.0 if self.semantics == "release" else None)
        return above_median(scores)
