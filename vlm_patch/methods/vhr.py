"""VHR: vision-aware head reinforcement. He et al., ACL 2025, https://arxiv.org/abs/2412.13949.

Heads whose output changes most when the image is taken away are amplified.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_patch.errors import PatchError
from vlm_patch.method import (
    ExtraPrompt,
    ForwardContext,
    Method,
    ModelInfo,
    State,
    Watcher,
)
from vlm_patch.primitives import dispatch
from vlm_patch.primitives.launch import launch
from vlm_patch.primitives.triton import jit, power_of_2, tl
from vlm_patch.validation import check_flag, check_number, check_wholes


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


@jit
def reinforced_heads(
    with_image: tl.tensor,
    text_only: tl.tensor,
    seen: tl.tensor,
    gain: tl.tensor,
    image_sample: tl.tensor,
    image_head: tl.tensor,
    text_sample: tl.tensor,
    text_head: tl.tensor,
    alpha: tl.tensor,
    HEADS: tl.constexpr,
    HW: tl.constexpr,
    D: tl.constexpr,
    DW: tl.constexpr,
    SQUARED: tl.constexpr,
    FILTER: tl.constexpr,
    GUARDED: tl.constexpr,
) -> None:
    """`VHR.choose` as one kernel, written for Triton: the gains `[B, H]`, alpha for the heads to
    reinforce in samples with an image, else 1; a program for each sample.
    """
    sample, head, channel = tl.program_id(0), tl.arange(0, HW), tl.arange(0, DW)
    real = head < HEADS
    inside = real[:, None] & (channel[None, :] < D)
    here = sample * image_sample + head[:, None] * image_head + channel[None, :]
    there = sample * text_sample + head[:, None] * text_head + channel[None, :]
    with_it = tl.load(with_image + here, mask=inside, other=0.0).to(tl.float32)
    without = tl.load(text_only + there, mask=inside, other=0.0).to(tl.float32)
    score = tl.sum((with_it - without) * (with_it - without), 1)
    if not SQUARED:
        score = tl.sqrt(score)
    if FILTER:
        strength = tl.sum(without * without, 1)
        mean, mean_strength = tl.sum(score, 0) / HEADS, tl.sum(strength, 0) / HEADS
        off = tl.where(real, score - mean, 0.0)
        off_strength = tl.where(real, strength - mean_strength, 0.0)
        spread = tl.sqrt(tl.sum(off * off, 0) / (HEADS - 1))
        spread_strength = tl.sqrt(tl.sum(off_strength * off_strength, 0) / (HEADS - 1))
        outlier = (off > spread) & (off_strength > spread_strength)
        if GUARDED:
            outlier = outlier & (tl.where(real, spread, 0.0) > 1.0)
        score = tl.where(outlier, 0.0, score)
    known = tl.where(real, score, float("inf"))
    earlier = (known[None, :] == known[:, None]) & (head[None, :] < head[:, None])
    rank = tl.sum(((known[None, :] < known[:, None]) | earlier).to(tl.int32), 1)
    median = tl.sum(tl.where(rank == (HEADS - 1) // 2, score, 0.0), 0)
    shown = tl.load(seen + sample) != 0
    found = tl.where((score > median) & shown, alpha, 1.0)
    tl.store(gain + sample * HEADS + head, found, mask=real)


PER_TOKEN = ("inputs_embeds", "input_ids", "per_layer_inputs")
"""Decoder inputs `[B, S, ...]` that a prompt without its image keeps."""


def without_image(forward: ForwardContext) -> dict[str, Any]:
    """The decoder inputs of a prompt with its image tokens deleted, left-padded, positions
    re-packed from 0.

    Returns inputs_embeds `[B, T, D]` (or what else stands for the tokens), attention_mask `[B, T]`,
    position_ids `[B, T]`, T the longest text of the batch. The mask is `[B, 1, T, T]` where text
    looks ahead (PaliGemma's prefix), which the decoder would not do by itself.
    """
    keep = (forward.valid & ~forward.image[:, forward.new])[:, : forward.position.prompt_rows]
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


@dataclass
class HeadState(State):
    """What VHR remembers of a generation, by layer.

    text: `[B, H, Dv]`, head outputs of the last row without the image.
    gain: `[B, H]`, of the chosen heads.
    """

    text: dict[int, Tensor] = field(default_factory=dict)
    gain: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VHR(Method):
    """Scales the heads whose output depends most on the image, chosen once per prompt (He et al.,
    section 3).

    alpha: gain of the chosen heads; 1 changes nothing.
    layers: where. None: the published ones, or those scaled to the depth (the second layer and the
        last 14 of 32).
    filter: leave out heads that are outliers without the image too.
    semantics: "release" (squared distance; the filter only where the scores spread by more than 1)
        or "paper".

    Raises ValueError on values out of range.

        wrap(model, VHR(alpha=2.0, layers=range(18, 32)))
    """

    name: ClassVar[str] = "vhr"
    state: ClassVar[type[State]] = HeadState

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

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        if self.layers is not None:
            info.check_layers("VHR layers", self.layers)
            return self, []
        if "layers" in info.profile:
            return replace(self, layers=tuple(info.profile["layers"])), []
        last = max(1, round(info.depth * 14 / 32))
        second, ending = min(1, info.depth - 1), range(info.depth - last, info.depth)
        layers = info.acting(sorted({second, *ending}))
        return replace(self, layers=layers), [f"VHR layers={list(layers)}"]

    def default_layers(self, depth: int) -> Sequence[int]:
        return self.layers or ()

    def decides_on_last_row(self, forward: ForwardContext) -> bool:
        return forward.position.first_prompt and forward.position.prompt_rows > 0

    def extra_prompt(
        self, forward: ForwardContext, state: HeadState, layers: list[int]
    ) -> ExtraPrompt | None:
        """The image-ablated prompt: keeps the last row's head outputs of layers that are on."""
        if not forward.position.first_prompt:
            return None
        if forward.position.resumed:
            raise PatchError(
                "vhr chooses its heads by the last row of the prompt and amplifies them in all "
                f"rows before it, of which {forward.position.past} are cached already: give the "
                "whole prompt, with its image, without a cache, or generate inside "
                '`with patch.disabled("vhr"):` (before a new turn, feed the answer token by token)'
            )
        if not forward.position.ends:
            raise PatchError(
                "vhr chooses its heads by the last row of the prompt and amplifies them in all "
                "rows before it, so a prompt cannot be read in chunks: leave prefill_chunk_size "
                'out, or generate inside `with patch.disabled("vhr"):`'
            )
        state.clear()

        def keep(layer: int, output: Tensor) -> None:
            if layer in layers:
                # a view would keep all rows in memory
                state.text[layer] = output[:, -1].detach().clone()

        return ExtraPrompt(without_image(forward), Watcher(heads=keep))

    def before_forward(self, forward: ForwardContext, state: HeadState) -> None:
        """Heads are chosen anew by every pass over the first prompt, and kept from then on."""
        if self.decides_on_last_row(forward):
            state.gain.clear()
        elif forward.position.starts and forward.image[:, forward.new].any():
            warnings.warn(
                "VHR keeps the heads that it chose at the conversation's first prompt, also for "
                "the image of this later turn. For heads of its own, give that turn without a "
                "cache.",
                stacklevel=2,
            )

    def edit_heads(
        self, layer: int, output: Tensor, forward: ForwardContext, state: HeadState
    ) -> Tensor | None:
        gain = state.gain.get(layer)
        if gain is None:
            if layer not in state.text:
                raise PatchError(
                    f"vhr is on in layer {layer}, but chose no heads there: they are chosen when "
                    "a conversation's first prompt is read, with its image. Switch layers before "
                    "the prompt."
                )
            with_image = output[:, forward.position.prompt_rows - 1].detach()
            gain = state.gain[layer] = self._gain(with_image, state.text[layer], forward)
        return gain

    def settled_gain(self, layer: int, state: HeadState) -> Tensor | None:
        return state.gain.get(layer)

    def _gain(self, with_image: Tensor, text_only: Tensor, forward: ForwardContext) -> Tensor:
        """The gains `[B, H]` by last-row outputs `[B, H, Dv]` with and without the image."""
        shard = forward.shard

        def by_torch() -> Tensor:
            outputs = shard.gather(with_image, 1), shard.gather(text_only, 1)
            chosen = shard.mine(self.choose(*outputs), 1)
            return torch.where(chosen & forward.seen[:, None], self.alpha, 1.0)

        device, dtype = with_image.device, with_image.dtype
        one_kind = dtype == text_only.dtype in (torch.float16, torch.bfloat16, torch.float32)
        fast = dispatch.possible(device.type) and with_image.stride(2) == 1 and one_kind
        if not fast or shard.ranks > 1:
            return by_torch()
        kind = ("choice of heads", self.name, str(device), dtype, *with_image.shape[1:])
        return dispatch.tried(kind, lambda: self._launch(with_image, text_only, forward), by_torch)

    def _launch(self, with_image: Tensor, text_only: Tensor, forward: ForwardContext) -> Tensor:
        """`_gain` by `reinforced_heads`."""
        (batch, heads, size), text_only = with_image.shape, text_only.contiguous()
        release = self.semantics == "release"
        gain = torch.empty(batch, heads, device=with_image.device)
        seen = forward.seen.contiguous()
        constants = {
            **{"HEADS": heads, "HW": power_of_2(heads), "D": size, "DW": power_of_2(size)},
            **{"SQUARED": release, "FILTER": self.filter, "GUARDED": release},
        }
        launch(reinforced_heads, (with_image.device, with_image.dtype), constants)(
            (batch, 1, 1),
            (with_image, text_only, seen, gain),
            (),
            (*with_image.stride()[:2], *text_only.stride()[:2]),
            (float(self.alpha),),
        )
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
