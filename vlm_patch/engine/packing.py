"""Packs a second prompt behind a prompt, as inputs of one forward of the decoder, or says why it
needs one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, QuantizedCache

from vlm_patch.engine.packed import Packed
from vlm_patch.engine.rows import Watching
from vlm_patch.engine.tracker import carries_images
from vlm_patch.method import ExtraPrompt, ForwardContext
from vlm_patch.models.tensor_parallel import Shard

MOST_ROWS_AT_ONCE = {"cuda": 1024}
"""Rows of all samples, by type of device, up to which one call of sdpa with a block mask reads both
prompts: a GPU is done with fewer before a second call is launched. Else each prompt has a call of
its own, which needs no mask where nothing is padded and so runs as fast as the stock model's."""
KINDS = ("full_attention", "sliding_attention")
OF_IMAGES = ("image", "pixel", "vis", "deepstack", "mm_encoder")
"""Parts of the names of decoder inputs that belong to image tokens; a row of text needs none."""


class CannotPack(Exception):
    """Why the second prompt needs a forward of its own, as the end of a sentence."""


@dataclass
class Packing:
    """Packs prompts for one decoder.

    softmax_only: every layer has softmax attention over the text's own tokens. counts_padding: the
    decoder counts its positions by padding. shard: which heads this process holds.
    in_stream: asks whether a method is on that meets all rows in the residual stream.
    """

    decoder: nn.Module
    cache_name: str
    softmax_only: bool
    counts_padding: bool
    shard: Shard
    in_stream: Callable[[], bool] = lambda: False

    def pack(self, forward: ForwardContext, kwargs: dict[str, Any], extra: ExtraPrompt) -> Packed:
        """Raises CannotPack where the second prompt would not be read as it is by itself."""
        reason = self.obstacle() or self._obstacle_now(kwargs)
        if reason:
            raise CannotPack(reason)
        length = extra.inputs["position_ids"].shape[1]
        rows = forward.valid.shape[1]
        inputs = {
            name: _behind(name, value, extra.inputs.get(name), len(forward.valid), rows, length)
            for name, value in kwargs.items()
            if name not in ("attention_mask", "position_ids")
        }
        inputs["position_ids"] = _positions(kwargs.get("position_ids"), forward.valid, extra)
        config: Any = self.decoder.config
        window = getattr(config, "sliding_window", None)
        masks = _Masks(forward.valid, extra.inputs["attention_mask"], window)
        inputs["attention_mask"] = masks.behind(kwargs.get("attention_mask"))
        watching, cache = Watching(extra.watcher), kwargs.get(self.cache_name)
        total = len(forward.valid) * (rows + length)
        few = total <= MOST_ROWS_AT_ONCE.get(forward.valid.device.type, 0)
        at_once = few and config._attn_implementation == "sdpa"
        return Packed(inputs, rows, length, watching, cache, at_once)

    def obstacle(self) -> str | None:
        """What stands against it in the model, whatever the prompt."""
        config: Any = self.decoder.config
        kernel = config._attn_implementation
        kinds = set(getattr(config, "layer_types", None) or ())
        other = sorted(kinds.difference(KINDS))
        ropes = _rope_types(config) & {"dynamic", "longrope"}
        reasons = {
            "some layers have no softmax attention over the text's own tokens": (
                not self.softmax_only
            ),
            f"its layers are of kind {', '.join(other)}": bool(other),
            "it attends in chunks": getattr(config, "attention_chunk_size", None) is not None,
            "its layers share keys and values": bool(getattr(config, "num_kv_shared_layers", 0)),
            "it counts positions by padding": self.counts_padding,
            "its attention depends on the distance in the sequence (ALiBi)": bool(
                getattr(config, "alibi", False)
            ),
            f"the length decides its positions ({', '.join(ropes)})": bool(ropes),
            f"attn_implementation={kernel!r} takes no block mask": kernel not in ("sdpa", "eager"),
            "its heads are split over processes": self.shard.ranks > 1,
            "a method edits the residual stream or reads logits off it": self.in_stream(),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _obstacle_now(self, kwargs: Mapping[str, Any]) -> str | None:
        """What stands against it in this forward."""
        config: Any = self.decoder.config
        cache = kwargs.get(self.cache_name)
        if self.decoder.training:
            return "the model is training"
        if cache is not None and type(cache) not in (DynamicCache, QuantizedCache):
            return f"a {type(cache).__name__} has places for the prompt alone"
        if kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
            return "the logits of its router are asked for"
        if carries_images(kwargs):
            return "its decoder itself puts images in the place of tokens"
        return None


def _rope_types(config: Any) -> set[Any]:
    """The kinds of rotary embedding in a config, of which there may be one per kind of layer."""
    given: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    parts = [given, *given.values()] if isinstance(given, Mapping) else []
    named = [part for part in parts if isinstance(part, Mapping)]
    return {part.get("rope_type", part.get("type")) for part in named}


def _behind(name: str, value: Any, own: Any, batch: int, rows: int, length: int) -> Any:
    """A decoder input with that of the second prompt behind it."""
    if own is not None:
        return torch.cat((value, own), 1)
    if name == "cache_position" and value is not None:
        return torch.cat((value, value[-1] + 1 + torch.arange(length, device=value.device)))
    if not any(_per_row(tensor, batch, rows) for tensor in _tensors(value)):
        return value
    if isinstance(value, Tensor) and value.dtype == torch.bool and of_image(name):
        return pad(value, (0, 0) * (value.ndim - 2) + (0, length))
    raise CannotPack(f"what its decoder takes as {name!r} is not known of other rows")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _per_row(value: Tensor, batch: int, rows: int) -> bool:
    return value.ndim > 1 and value.shape[1] == rows and value.shape[0] in (1, batch)


def of_image(name: str) -> bool:
    """Whether a decoder input belongs to image tokens, by its name."""
    return any(part in name for part in OF_IMAGES)


def _positions(given: Tensor | None, valid: Tensor, extra: ExtraPrompt) -> Tensor:
    """Positions `[..., B, S + T]` of both prompts, each counted for itself."""
    own: Tensor = extra.inputs["position_ids"]
    batch, rows = valid.shape
    if given is None:
        if not valid.all():
            raise CannotPack("it was given no positions, and the prompt is padded")
        given = torch.arange(rows, device=valid.device)[None]
    given = given.expand(*given.shape[:-2], batch, rows)
    own = own.to(given).expand(*given.shape[:-2], *own.shape)
    return torch.cat((given, own), -1)


@dataclass
class _Masks:
    """Makes masks of both prompts.

    valid: `[B, S]`, rows of the prompt that are no padding. own: the mask of the second prompt (see
    `ExtraPrompt`). window: of layers with a sliding window.
    """

    valid: Tensor
    own: Any
    window: int | None

    def behind(self, given: Any) -> Any:
        """The attention_mask of a decoder, for both: `[B, S + T]`, or `[B, 1, S + T, S + T]` where
        the prompt's was made before, or a mapping of such, or None where all see all before them.
        """
        if not isinstance(given, Mapping):
            if isinstance(given, Tensor) and given.ndim == 4:
                if self.window is not None and self.own.shape[-1] > self.window:
                    raise CannotPack("one mask was made for layers with and without a window")
                return self._blocks(given, self.own, None)
            return self._line(given)
        if not set(given).issubset(KINDS):
            raise CannotPack(f"masks were made for layers of kind {', '.join(sorted(given))}")
        return {kind: self._of_kind(kind, mask) for kind, mask in given.items()}

    def _of_kind(self, kind: str, given: Any) -> Tensor | None:
        own = self.own[kind] if isinstance(self.own, Mapping) else self.own
        window = self.window if kind == "sliding_attention" else None
        if given is None and (own is None or (_fits(own, window) and own.all())):
            return None
        return self._blocks(given, own, window)

    def _line(self, given: Tensor | None) -> Tensor | None:
        """The padding of both prompts."""
        if given is None and self.own.all():
            return None
        given = self.valid if given is None else given
        if given.shape != self.valid.shape:
            raise CannotPack(f"a mask of shape {list(given.shape)} holds other rows too")
        return torch.cat((given, self.own.to(given)), 1)

    def _blocks(self, given: Tensor | None, own: Tensor, window: int | None) -> Tensor:
        """One mask for both, in which each sees itself."""
        batch, rows = self.valid.shape
        if given is None:
            given = self.valid.new_ones(1, 1, rows, rows).tril()
        if given.shape[-2:] != (rows, rows):
            raise CannotPack(f"a mask of shape {list(given.shape)} holds other keys too")
        seen = own if own.ndim == 4 else _causal(own.to(given.device).bool(), window)
        length, plain = rows + own.shape[-1], given.dtype == torch.bool
        lowest = False if plain else torch.finfo(given.dtype).min
        both = given.new_full((batch, given.shape[1], length, length), lowest)
        both[:, :, :rows, :rows] = given
        both[:, :, rows:, rows:] = seen if plain else torch.where(seen, 0.0, lowest)
        return both


def _fits(own: Tensor, window: int | None) -> bool:
    return own.ndim == 2 and (window is None or own.shape[1] <= window)


def _causal(valid: Tensor, window: int | None) -> Tensor:
    """What rows see of those before them, `[B, 1, T, T]` (bool); valid `[B, T]`."""
    length = valid.shape[1]
    seen = valid.new_ones(length, length).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    return (seen & valid[:, None])[:, None]
