"""Extra forward passes of the decoder, inside the forward that is about to start: those that
methods ask for, and parts of a prompt that must be read earlier or once more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlm_patch.engine.attention import ForwardHandler, ThreadState
from vlm_patch.engine.packed import Packed
from vlm_patch.engine.packing import CannotPack, Packing, of_image
from vlm_patch.engine.plans import ActiveMethod
from vlm_patch.engine.rows import Editing, Watching
from vlm_patch.engine.state import GenerationState, Tail
from vlm_patch.errors import PatchError
from vlm_patch.method import ExtraPrompt, ForwardContext, Method, Phase, Watcher

OLD_CACHE_NAME = "past_key_values"


@dataclass
class ExtraPasses:
    """Runs the decoder once more; a pass leaves hooks and thread state as it found them.

    decoder: the patched decoder.
    learned: told of a method that found out something about the model.
    padding: the padding token, where the decoder counts its positions by it and takes none.
    now: what this thread does.
    packing: packs a second prompt behind a prompt.
    unpacked: why the last second prompt was not, or "".
    """

    decoder: nn.Module
    learned: Callable[[Method, Method], None]
    padding: int | None
    now: ThreadState
    packing: Packing
    unpacked: str | None = None

    def __post_init__(self) -> None:
        self.cache_name = cache_name(self.decoder)

    def probe(self, active: ActiveMethod, forward: ForwardContext) -> ExtraPrompt | None:
        """Runs a method's own passes of the stock model, and keeps what it learned of the model.
        Returns the prompt that it wants to be read beside this one.
        """
        before, layers = active.method, list(active.heads)
        with torch.no_grad():
            active.method = before.probe(forward, active.state, layers, self.watch)
            extra = active.method.extra_prompt(forward, active.state, layers)
        if active.method is not before:
            self.learned(before, active.method)
        return extra

    def watch(self, inputs: dict[str, Any], watcher: Watcher) -> None:
        """Lets a method look at the stock model."""
        if self.padding is not None:
            inputs = _counted(inputs, self.padding)
        with torch.no_grad():
            self.run(Watching(watcher), self.without_cache(inputs))

    def read_extra(
        self,
        prompts: list[ExtraPrompt],
        forward: ForwardContext,
        kwargs: dict[str, Any],
        twice: bool,
    ) -> Packed | None:
        """Reads second prompts; one of them, if it may, in the forward that is about to start.

        twice: the prompt is read twice, so that no forward can be shared.
        """
        packed = None
        for extra in prompts:
            self.unpacked = ""
            try:
                if twice or packed is not None:
                    raise CannotPack(
                        "a method reads the prompt twice"
                        if twice
                        else "another one shares the prompt's"
                    )
                packed = self.packing.pack(forward, kwargs, extra)
            except CannotPack as reason:
                self.unpacked = str(reason)
                self.watch(extra.inputs, extra.watcher)
        return packed

    def report(self) -> str:
        """How extra prompts are read, for people."""
        reason = self.packing.obstacle() if self.unpacked is None else self.unpacked
        if reason:
            return f"its extra prompt takes a forward of its own, since {reason}"
        return "its extra prompt shares the prompt's forward"

    def run(
        self,
        run: ForwardHandler | None,
        kwargs: dict[str, Any],
        module: Callable[..., Any] | None = None,
    ) -> Any:
        """Runs the decoder once more, or the whole model as `module`, inside a forward."""
        self.now.run, self.now.inside = run, True
        try:
            return (module or self.decoder)(**kwargs)
        finally:
            self.now.run, self.now.inside = None, False

    def keep_tail(
        self, forward: ForwardContext, generation: GenerationState, kwargs: dict[str, Any]
    ) -> None:
        """Keeps the rows behind the image, of a prompt that may go on."""
        at, rows = forward.position, forward.valid.shape[1]
        text = rows if at.last_image_row is None else rows - 1 - at.last_image_row
        if at.last_image_row is not None or not at.resumed:
            generation.tails = []
        if not at.may_continue or not text:
            return
        image = bool(forward.image[:, -text:].any())
        partial = image and any(v is not None and of_image(name) for name, v in kwargs.items())
        _, inputs = _last_rows(forward, kwargs, text)
        inputs.pop(self.cache_name, None)
        past = at.past + rows - text
        generation.tails.append(Tail(past, text, _copied(inputs), partial))

    def read_again(
        self,
        forward: ForwardContext,
        generation: GenerationState,
        actives: list[ActiveMethod],
        kwargs: dict[str, Any],
    ) -> ForwardContext:
        """Reads the cached text behind the image once more, as a part of a prompt that goes on.

        It was read as the end of a prompt: its last row was edited, which this one's must not be,
        and what it asks about was taken from the beginning of the question alone.
        """
        tails, start, past = generation.tails, generation.edge, forward.position.past
        if not forward.image[:, :past].any() or start in (0, past):
            return forward
        cache: Any = kwargs[self.cache_name]
        tails = [tail for tail in tails if start <= tail.past]
        known = start + sum(tail.rows for tail in tails) == past
        if not known or not can_be_cut(cache) or any(tail.partial for tail in tails):
            raise PatchError(
                f"this prompt goes on behind a cache that ends {past - start} tokens behind the "
                "image, which a method that reads the question must see again as a part of it, and "
                "they were not kept, or cannot be taken out of this cache. Cut the prompt right "
                "behind the last image token: read that part by a forward of the model, or crop "
                "the cache to it."
            )
        cache.crop(start - past)
        stock = [replace(a, heads={}) if a.method.edits_prompt_end else a for a in actives]
        for tail in tails:
            part = _part(forward, generation, tail)
            for active in actives:
                active.method.before_forward(part, active.state)
            self.run(Editing(part, stock, False), {**tail.inputs, self.cache_name: cache})
            forward = replace(forward, position=replace(forward.position, starts=False))
        return forward

    def read_first(
        self,
        forward: ForwardContext,
        actives: list[ActiveMethod],
        late: list[ActiveMethod],
        kwargs: dict[str, Any],
    ) -> tuple[ForwardContext, dict[str, Any]]:
        """Shows the prompt to methods that must see it before their first edit, with that edit off.

        What is left to run is its last token and what was drafted behind it, on the same cache,
        since such an edit changes no other row; or all of it, where no cache can be cut or another
        method decides something by that row.
        """
        for active in actives:
            active.method.before_forward(forward, active.state)
        first = [replace(a, heads={}) if a in late else a for a in actives]
        cache: Any = kwargs.get(self.cache_name)
        others = [a.method for a in actives if a not in late]
        deciding = [method.name for method in others if method.decides_on_last_row(forward)]
        if deciding and forward.position.past:
            raise PatchError(
                f"{late[0].method.name} watches a layer that is not below those it edits, and "
                f"{deciding[0]} decides something for the whole prompt by the row that it edits "
                "there, so the prompt would have to be read twice, which behind a cache cannot be: "
                "watch a lower layer, or give the whole conversation without a cache"
            )
        again = bool(deciding) or bool(forward.image[:, -1].any()) or _last_is_seen(forward, kwargs)
        if again or not can_be_cut(cache):
            if forward.position.past:
                raise PatchError(
                    f"{late[0].method.name} watches a layer that is not below those it edits, "
                    "which behind a cache needs one that can be cut: use a DynamicCache of a "
                    "model without sliding window and linear attention, or watch a lower layer"
                )
            with torch.no_grad():
                self.run(Editing(forward, first, False), self.without_cache(kwargs))
            return replace(forward, reading=False), kwargs
        shows = shows_weights(self.decoder, kwargs)
        self.now.first = self.run(Editing(forward, first, shows), kwargs)
        left = forward.valid.shape[1] - forward.position.prompt_rows + 1
        cache.crop(-left)
        return _last_rows(forward, kwargs, left)

    def without_cache(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a prompt for a pass that leaves no trace; masks for a static cache are
        cut.
        """
        embeds = kwargs.get("inputs_embeds")
        rows = (kwargs["input_ids"] if embeds is None else embeds).shape[1]

        def cut(mask: Any) -> Any:
            if isinstance(mask, Mapping):
                return {kind: cut(of_kind) for kind, of_kind in mask.items()}
            return mask[..., :rows] if isinstance(mask, Tensor) and mask.ndim == 4 else mask

        mask = cut(kwargs.get("attention_mask"))
        nothing = {self.cache_name: None, "use_cache": False}
        return {**kwargs, "attention_mask": mask, **nothing}


def can_be_cut(cache: Any) -> bool:
    """Whether the last token can be taken out of a cache again: not out of a sliding window, nor
    out of the state of linear attention.
    """
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    return type(cache) is DynamicCache and kinds <= {"DynamicLayer", "DummyLayer"}


def _last_is_seen(forward: ForwardContext, kwargs: Mapping[str, Any]) -> bool:
    """Whether other rows of the prompt look at its last token, as in PaliGemma's prefix."""
    given = kwargs.get("attention_mask")
    masks = list(given.values()) if isinstance(given, Mapping) else [given]
    last = forward.position.past + forward.valid.shape[1] - 1
    for mask in masks:
        if isinstance(mask, Tensor) and mask.ndim == 4:
            seen = mask[:, 0, :-1, min(last, mask.shape[-1] - 1)]
            seen = seen if seen.dtype == torch.bool else seen == 0
            if (seen & forward.valid[:, :-1]).any():
                return True
    return False


def _counted(kwargs: Mapping[str, Any], padding: int) -> dict[str, Any]:
    """The inputs for a decoder that counts positions by its padding tokens."""
    hidden = kwargs["attention_mask"] == 0
    ids = kwargs["input_ids"].masked_fill(hidden, padding)
    return {**kwargs, "input_ids": ids, "position_ids": None}


def shows_weights(decoder: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the user wants to see attention weights."""
    config: Any = decoder.config
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))


def _last_rows(
    forward: ForwardContext, kwargs: dict[str, Any], left: int
) -> tuple[ForwardContext, dict[str, Any]]:
    """The step that remains when all of a prompt but the `left` last rows is done."""
    batch, rows = forward.valid.shape

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(name, item) for key, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        if name == "attention_mask":
            return value[:, :, -left:] if value.ndim == 4 else value
        if name in ("position_ids", "cache_position"):
            return value[..., -left:]
        per_row = value.ndim > 1 and value.shape[:2] == (batch, rows)
        return value[:, -left:] if per_row else value

    inputs = {name: cut(name, value) for name, value in kwargs.items() if not of_image(name)}
    past = forward.position.past + rows - left
    position = replace(forward.position, past=past, prompt_rows=1, starts=False)
    step = replace(
        forward,
        position=position,
        valid=forward.valid[:, -left:],
        text=forward.text[:, -left:],
        last=forward.last[:, -left:],
        reading=False,
        inputs=inputs,
    )
    return step, inputs


def _copied(value: Any) -> Any:
    """The same tensors, not as views of larger ones, nor with their gradients."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


def _part(forward: ForwardContext, generation: GenerationState, tail: Tail) -> ForwardContext:
    """The rows of a tail as a part of the prompt that goes on in `forward`."""
    total = tail.past + tail.rows
    image, query, content = (
        mask[:, :total] for mask in (forward.image, forward.query, forward.content)
    )
    valid = generation.keys.valid[:, tail.past - generation.start : total - generation.start]
    position = replace(
        forward.position,
        past=tail.past,
        phase=Phase.CHUNK,
        prompt_rows=tail.rows,
        ends=False,
        last_image_row=None,
    )
    return replace(
        forward,
        position=position,
        image=image,
        query=query,
        content=content,
        valid=valid,
        text=~image[:, tail.past :] & valid & (image.cumsum(1)[:, tail.past :] > 0),
        last=torch.zeros_like(valid),
        inputs=tail.inputs,
    )


def cache_name(decoder: nn.Module) -> str:
    """What a decoder calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    known = inspect.signature(type(decoder).forward).parameters
    return "cache" if "cache" in known else OLD_CACHE_NAME
