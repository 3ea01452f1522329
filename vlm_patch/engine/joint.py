"""A generated token of several streams in one forward of the decoder: their samples stand beside
each other in its batch, so that its weights are read once; only attention is done stream by stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_patch.engine.attention import CONFIG, ThreadState
from vlm_patch.engine.branches import Part, Stream
from vlm_patch.engine.extra_passes import can_be_cut, shows_weights
from vlm_patch.models.info import Decoder

Attend: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]
TENSORS = ("inputs_embeds", "attention_mask", "position_ids", "cache_position")
"""Decoder inputs that are known to be what they are called; with others streams run apart."""


@dataclass
class JointStep:
    """One forward of several streams, the first one's samples in front.

    streams: the others. masks: by stream, the keys to be seen `[B, 1, 1, K]` (bool), None for all.
    past: the other streams' keys and values of the layer that is running.
    """

    now: ThreadState
    streams: list[Stream]
    masks: list[Tensor | None]
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(
        self,
        attention: Attend,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of a layer; methods act on the first stream alone."""
        first, *others = query.chunk(len(self.masks))
        seen, *masks = (None if m is None else m.to(query.device) for m in self.masks)
        run, self.now.joint = self.now.run, None
        try:
            output, weights = attention(module, first, key, value, seen, **options)
            self.now.run, outputs = None, [output]
            for part, (own, held), mask in zip(others, self.past, masks, strict=True):
                outputs.append(attention(module, part, own, held, mask, **options)[0])
        finally:
            self.now.run, self.now.joint = run, self
        return torch.cat(outputs), weights


class JointCache(DynamicCache):
    """The first stream's cache, that shares its layers with it, and hands the others' samples on to
    their own.
    """

    def __init__(self, cache: DynamicCache, step: JointStep) -> None:
        self.__dict__.update(cache.__dict__)
        self.step = step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        parts = len(self.step.masks)
        (key, *keys), (value, *values) = key_states.chunk(parts), value_states.chunk(parts)
        self.step.past = [
            stream.cache.update(own, held, layer_idx, *args, **kwargs)
            for stream, own, held in zip(self.step.streams, keys, values, strict=True)
        ]
        found: tuple[Tensor, Tensor] = super().update(key, value, layer_idx, *args, **kwargs)
        return found


def can_join(
    decoder: Decoder, given: Mapping[str, Any], cache: Any, streams: Sequence[Stream]
) -> bool:
    """Whether a token of all streams can run as one batch: with plain caches, softmax attention by
    the plain kernel in every layer, and inputs that are known.
    """
    strange = [k for k, v in given.items() if isinstance(v, Tensor) and k not in TENSORS]
    whole = given.get("inputs_embeds") is not None and given.get("position_ids") is not None
    mask = given.get("attention_mask")
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    layers: list[Any] = [layer.attention for layer in decoder.layers]
    return (
        bool(streams)
        and whole
        and plain
        and not strange
        and not decoder.module.training
        and len(layers) == decoder.depth
        and all(can_be_cut(one) for one in (cache, *(stream.cache for stream in streams)))
        and not given.get("output_hidden_states")
        and not shows_weights(decoder.module, given)
        and {module.__dict__[CONFIG]._attn_implementation for module in layers} == {"sdpa"}
    )


def join(
    now: ThreadState, given: Mapping[str, Any], name: str, streams: list[Stream], parts: list[Part]
) -> dict[str, Any]:
    """The decoder's inputs for a token of all streams; `name`: what it calls its cache."""
    embeds, places = given["inputs_embeds"], given["position_ids"]
    mask = given.get("attention_mask")
    seen = [mask, *(stream.grow(part, 1) for stream, part in zip(streams, parts, strict=True))]
    masks = [None if keys is None else keys.bool()[:, None, None] for keys in seen]
    step = now.joint = JointStep(now, streams, masks)
    shape = *places.shape[:-2], len(embeds), 1
    own = [places, *(part.inputs["position_ids"] for part in parts)]
    return {
        **given,
        "inputs_embeds": embeds.repeat(len(masks), 1, 1),
        "position_ids": torch.cat([place.expand(shape) for place in own], -2),
        "attention_mask": None,
        name: JointCache(given[name], step),
    }
