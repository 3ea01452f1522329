"""What happens around one forward of the decoder: methods look, first passes run, then the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache, StaticCache

from vlm_patch.engine.attention import CARRIED, Call, Now, Run
from vlm_patch.engine.rows import Active, Editing, Watching
from vlm_patch.engine.state import Generation, Tail, attach
from vlm_patch.engine.tracker import Layout, carries_images
from vlm_patch.errors import PatchError
from vlm_patch.method import Forward, Method, Watcher

OLD_CACHE_NAME = "past_key_values"


OF_IMAGES = ("image", "pixel", "vis", "deepstack", "mm_encoder")
"""Parts of the names of decoder inputs that belong to image tokens; a row of text needs none."""


class Hook:
    """A hook that does nothing in a deep copy or a pickle of the model."""

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self.call = call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.call is None else self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None,)


class QuietHook(Hook):
    """A hook that costs next to nothing while this thread runs nothing."""

    def __init__(self, call: Callable[..., Any] | None, now: Now) -> None:
        super().__init__(call)
        self.now = now

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, more: Any) -> Any:
        now = self.now
        if now.run is None and now.first is None and not (type(more) is dict and CARRIED in more):
            return None
        return super().__call__(module, args, more)


class Lost:
    """Takes the place of what attention serves in a layer that is run again for its gradients, and
    so must be given it by hand (`CARRIED`).
    """

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        raise PatchError(
            f"layer {call.layer} was not handed what this patch does in it, which is needed where "
            "layers run twice: train without gradient checkpointing, or inside "
            "`with patch.disabled():`"
        )


@dataclass
class Passes:
    """The hooks of a patched model.

    switched: the methods that are on, each with its layers and their heads; asked at every forward.
    learned: told of a method that found out something about the model. padding: the padding token,
    where the decoder counts its positions by it and takes none.
    """

    decoder: nn.Module
    layout: Layout
    switched: Callable[[], list[tuple[Method, dict[int, Tensor | None]]]]
    learned: Callable[[Method, Method], None]
    padding: int | None = None
    now: Now = field(default_factory=Now)

    def __post_init__(self) -> None:
        self.cache_name = cache_name(self.decoder)

    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        if self.now.inside:
            return
        inputs = self.layout.pending = _named(module, args, kwargs) if args else kwargs
        tower = self.layout.tower
        if tower is not None and carries_images(inputs) and _readers(self.switched()):
            tower.listen(inputs)

    def before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the decoder."""
        if self.now.inside:
            return None
        self.now.run = self.now.first = None
        if self.layout.tower is not None:
            self.layout.tower.run = None
        switched = self.switched()
        if not switched:
            self.layout.pending = None
            return None
        kwargs = _named(module, args, kwargs)
        if "write_index" in kwargs:
            self.layout.see_continuous_batch()
            return None
        if OLD_CACHE_NAME in kwargs:
            kwargs.setdefault(self.cache_name, kwargs.pop(OLD_CACHE_NAME))
        cache = kwargs.get(self.cache_name)
        _check(cache)
        asking = [method for method, _ in switched if method.reads_question]
        kept = cache is not None or _wants_cache(module, kwargs)
        reader = _readers(switched)
        forward, generation = self.layout.see_decoder(
            kwargs,
            cache,
            kept,
            bool(asking),
            asking[0].words if asking else "all",
            reader[0] if reader else None,
            any(method.edits_prompt_end for method, _ in switched),
        )
        if cache is None and kept:
            config: Any = module.config
            cache = kwargs[self.cache_name] = DynamicCache(config=config)
        if cache is not None and forward.past == 0:
            attach(cache, generation)
        if generation.pictured:
            kwargs = self._start(forward, generation, switched, kwargs)
        else:
            generation.stock = generation.length
        return (), kwargs

    def after_decoder(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the decoder, called after errors too."""
        if self.now.inside:
            return None
        first, self.now.run, self.now.first = self.now.first, None, None
        if first is None or output is None:
            return None
        for name, dim in (("last_hidden_state", 1), ("hidden_states", 1), ("attentions", 2)):
            if output.get(name) is not None:
                output[name] = _join(first[name], output[name], dim)
        return output

    def before_block(self, layer: int) -> Callable[..., None]:
        """A forward pre-hook for the block of a layer."""

        def show(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            run = kwargs.get(CARRIED, self.now.run)
            if run is None:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            if isinstance(run, Watching) and run.watcher.block is not None:
                run.watcher.block(layer, hidden)
            elif isinstance(run, Editing):
                forward = run.forward.on(hidden.device)
                for active in run.actives:
                    if active.method.reads_blocks and layer in active.heads:
                        active.method.block_input(layer, hidden, forward, active.memory)

        return show

    def _start(
        self,
        forward: Forward,
        generation: Generation,
        switched: list[tuple[Method, dict[int, Tensor | None]]],
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Lets methods look, runs first passes; returns the decoder inputs that remain to run."""
        actives = []
        for method, layers in switched:
            memory = generation.memory.setdefault(method.name, {})
            actives.append(Active(method, memory, layers))
            if method.reads_blocks:
                generation.follow(method.name, layers, forward.past)
            elif method.tower_reads():
                generation.follow(method.name, (), forward.past)
        if forward.starts:
            for active in actives:
                self._look(active, forward)
        at_end = any(active.method.edits_prompt_end for active in actives)
        if at_end and forward.starts and forward.resumed:
            forward = self._read_again(forward, generation, actives, kwargs)
        if at_end and forward.prompt:
            self._keep_tail(forward, generation, kwargs)
        shows = _shows(self.decoder, kwargs)
        late = [active for active in actives if _late(active, forward)]
        if late:
            forward, kwargs = self._read_first(forward, actives, late, kwargs)
        for active in actives:
            active.method.begin(forward, active.memory)
        run: Editing | None = generation.step
        if run is not None and run.serves(actives, forward):
            run.go_on(forward)
            run.shows = shows
        else:
            run = Editing(forward, actives, shows)
        generation.step = None if forward.prompt else run
        self.now.run = run
        if self.decoder.training and _runs_layers_again(self.decoder):
            kwargs[CARRIED], self.now.run = run, Lost()
        return kwargs

    def _look(self, active: Active, forward: Forward) -> None:
        """Runs a method's own passes of the stock model, and keeps what it learned of the model."""

        def run(inputs: dict[str, Any], watcher: Watcher) -> None:
            if self.padding is not None:
                inputs = _counted(inputs, self.padding)
            self._run(Watching(watcher), self._without_cache(inputs))

        before = active.method
        with torch.no_grad():
            active.method = before.look(forward, active.memory, list(active.heads), run)
        if active.method is not before:
            self.learned(before, active.method)

    def _run(self, run: Run, kwargs: dict[str, Any]) -> Any:
        """Runs the decoder once more, inside the forward that is about to start."""
        self.now.run, self.now.inside = run, True
        try:
            return self.decoder(**kwargs)
        finally:
            self.now.run, self.now.inside = None, False

    def _keep_tail(self, forward: Forward, generation: Generation, kwargs: dict[str, Any]) -> None:
        """Keeps the rows behind the image, of a prompt that may go on."""
        rows = forward.valid.shape[1]
        text = rows if forward.edge is None else rows - 1 - forward.edge
        if forward.edge is not None or not forward.resumed:
            generation.tails = []
        if not forward.open or not text:
            return
        image = bool(forward.image[:, -text:].any())
        partial = image and any(v is not None and _of_image(name) for name, v in kwargs.items())
        _, inputs = _last_rows(forward, kwargs, text)
        inputs.pop(self.cache_name, None)
        past = forward.past + rows - text
        generation.tails.append(Tail(past, text, _copied(inputs), partial))

    def _read_again(
        self,
        forward: Forward,
        generation: Generation,
        actives: list[Active],
        kwargs: dict[str, Any],
    ) -> Forward:
        """Reads the cached text behind the image once more, as a part of a prompt that goes on.

        It was read as the end of a prompt: its last row was edited, which this one's must not be,
        and what it asks about was taken from the beginning of the question alone.
        """
        tails, start, past = generation.tails, generation.edge, forward.past
        if not forward.image[:, :past].any() or start in (0, past):
            return forward
        cache: Any = kwargs[self.cache_name]
        tails = [tail for tail in tails if start <= tail.past]
        known = start + sum(tail.rows for tail in tails) == past
        if not known or not _can_be_cut(cache) or any(tail.partial for tail in tails):
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
                active.method.begin(part, active.memory)
            self._run(Editing(part, stock, False), {**tail.inputs, self.cache_name: cache})
            forward = replace(forward, starts=False)
        return forward

    def _read_first(
        self,
        forward: Forward,
        actives: list[Active],
        late: list[Active],
        kwargs: dict[str, Any],
    ) -> tuple[Forward, dict[str, Any]]:
        """Shows the prompt to methods that must see it before their first edit, with that edit off.

        What is left to run is its last token and what was drafted behind it, on the same cache,
        since such an edit changes no other row; or all of it, where no cache can be cut or another
        method settles something by that row.
        """
        for active in actives:
            active.method.begin(forward, active.memory)
        first = [replace(a, heads={}) if a in late else a for a in actives]
        cache: Any = kwargs.get(self.cache_name)
        again = any(a.method.settles(forward) for a in actives if a not in late)
        again |= bool(forward.image[:, -1].any()) or _last_is_seen(forward, kwargs)
        if again or not _can_be_cut(cache):
            if forward.past:
                raise PatchError(
                    f"{late[0].method.name} watches a layer that is not below those it edits, "
                    "which behind a cache needs one that can be cut: use a DynamicCache of a "
                    "model without sliding window and linear attention, or watch a lower layer"
                )
            with torch.no_grad():
                self._run(Editing(forward, first, False), self._without_cache(kwargs))
            return replace(forward, reading=False), kwargs
        shows = _shows(self.decoder, kwargs)
        self.now.first = self._run(Editing(forward, first, shows), kwargs)
        left = forward.valid.shape[1] - forward.prompt + 1
        cache.crop(-left)
        return _last_rows(forward, kwargs, left)

    def _without_cache(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
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


def cache_name(decoder: nn.Module) -> str:
    """What a decoder calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    known = inspect.signature(type(decoder).forward).parameters
    return "cache" if "cache" in known else OLD_CACHE_NAME


def _readers(switched: list[tuple[Method, dict[int, Tensor | None]]]) -> list[str]:
    """The names of the methods that read the vision tower."""
    return [method.name for method, _ in switched if method.tower_reads()]


def _can_be_cut(cache: Any) -> bool:
    """Whether the last token can be taken out of a cache again: not out of a sliding window, nor
    out of the state of linear attention.
    """
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    return type(cache) is DynamicCache and kinds <= {"DynamicLayer", "DummyLayer"}


def _last_is_seen(forward: Forward, kwargs: Mapping[str, Any]) -> bool:
    """Whether other rows of the prompt look at its last token, as in PaliGemma's prefix."""
    given = kwargs.get("attention_mask")
    masks = list(given.values()) if isinstance(given, Mapping) else [given]
    last = forward.past + forward.valid.shape[1] - 1
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


def _wants_cache(decoder: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the decoder is about to make a cache of its own, which could not be followed."""
    wanted = kwargs.get("use_cache")
    if wanted is None:
        config: Any = decoder.config
        wanted = not decoder.training and getattr(config, "use_cache", False)
    return bool(wanted)


def _shows(decoder: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the user wants to see attention weights."""
    config: Any = decoder.config
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))


def _runs_layers_again(decoder: nn.Module) -> bool:
    """Whether gradient checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def _check(cache: Any) -> None:
    if cache is not None and type(cache) not in (DynamicCache, StaticCache, QuantizedCache):
        raise PatchError(
            f"a {type(cache).__name__} is not supported on a patched model: what it keeps of a "
            "prompt is not known. Use a DynamicCache (the default), a StaticCache or a "
            "QuantizedCache, or run inside `with patch.disabled():`"
        )


def _late(active: Active, forward: Forward) -> bool:
    """Whether a method edits, in this forward, a layer that is not above all that it watches."""
    watched = active.method.watched(forward) if forward.ends else None
    if watched is None or not active.heads or max(watched[0]) < min(active.heads):
        return False
    edited = active.method.edited(forward)
    return edited is not None and bool(edited.any())


def _last_rows(
    forward: Forward, kwargs: dict[str, Any], left: int
) -> tuple[Forward, dict[str, Any]]:
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

    inputs = {name: cut(name, value) for name, value in kwargs.items() if not _of_image(name)}
    step = replace(
        forward,
        past=forward.past + rows - left,
        valid=forward.valid[:, -left:],
        text=forward.text[:, -left:],
        last=forward.last[:, -left:],
        reading=False,
        inputs=inputs,
        prompt=1,
        starts=False,
    )
    return step, inputs


def _of_image(name: str) -> bool:
    return any(part in name for part in OF_IMAGES)


def _copied(value: Any) -> Any:
    """The same tensors, not as views of larger ones, nor with their gradients."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value


def _part(forward: Forward, generation: Generation, tail: Tail) -> Forward:
    """The rows of a tail as a part of the prompt that goes on in `forward`."""
    total = tail.past + tail.rows
    image, query, content = (
        mask[:, :total] for mask in (forward.image, forward.query, forward.content)
    )
    valid = generation.keys["valid", 0][:, tail.past - generation.start : total - generation.start]
    return replace(
        forward,
        past=tail.past,
        image=image,
        query=query,
        content=content,
        valid=valid,
        text=~image[:, tail.past :] & valid & (image.cumsum(1)[:, tail.past :] > 0),
        last=torch.zeros_like(valid),
        inputs=tail.inputs,
        prompt=tail.rows,
        starts=forward.starts,
        ends=False,
        edge=None,
    )


def _join(first: Any, last: Any, dim: int) -> Any:
    """The rows of a first pass, along `dim`, with the last ones replaced; layer by layer for
    tuples.
    """
    if isinstance(last, tuple):
        return tuple(_join(a, b, dim) for a, b in zip(first, last, strict=True))
    rows = last.shape[dim]
    return torch.cat((first.narrow(dim, 0, first.shape[dim] - rows), last), dim)


def _named(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All inputs by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
