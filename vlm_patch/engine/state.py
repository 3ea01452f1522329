"""What is remembered of one generation; it travels with its cache."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from vlm_patch.errors import PatchError
from vlm_patch.method import State
from vlm_patch.primitives.buffers import append
from vlm_patch.prompts.masks import PromptMasks

KEY_MASKS = ("image", "query", "content")


@dataclass
class Tail:
    """The text at the end of a cached part of a prompt, to be run again if the prompt is resumed.

    past: how many tokens stand before its rows.
    rows: how many it has.
    inputs: what its decoder forward was given, but for the cache.
    partial: inputs of image tokens are missing.
    """

    past: int
    rows: int
    inputs: dict[str, Any]
    partial: bool

    def select(self, index: Tensor, batch: int) -> None:
        """Follows the cache, of `batch` samples, when they are reordered or repeated."""
        self.inputs = {name: _select(name, v, index, batch) for name, v in self.inputs.items()}


def _select(name: str, value: Any, index: Tensor, batch: int) -> Any:
    if isinstance(value, dict):
        return {key: _select(name, item, index, batch) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    dim = 1 if name == "position_ids" and value.ndim == 3 else 0  # m-rope: [3, B, S]
    if value.ndim <= dim or value.shape[dim] != batch:
        return value
    return value.index_select(dim, index.to(value.device))


@dataclass
class TokenMasks(State):
    """What is known of the tokens of a generation, of B samples.

    image, query, content: `[B, at least length]` (bool), see `ForwardContext`.
    ids: `[B, N]`, the prompt read last, where its tokens are known.
    valid: `[B, N]` (bool), which of them are no padding.
    seen: `[B]` (bool), samples with an image.
    """

    image: Any = None
    query: Any = None
    content: Any = None
    ids: Tensor | None = None
    valid: Any = None
    seen: Any = None


@dataclass
class GenerationState:
    """What is remembered of one generation; it travels with the cache, also through a deep copy.

    owner: the patch that made it.
    batch, length: number of samples, tokens seen so far.
    start, end: the prompt read last, in tokens from the beginning.
    resumed: where reading it went on, behind a part that an earlier forward took for a whole
        prompt; start where there was none.
    answered: it was read by `generate`, which answers.
    keys: the masks of the tokens.
    states: what each method remembers, by its name.
    history: by method, the layers in which it was on, and up to which length.
    step: what is done at every generated token (a `rows.Editing`).
    pictured: whether any sample has an image; without one everything is left stock.
    stock: the length up to which it was.
    open: more of the prompt may follow in a later forward.
    edge: number of tokens up to and with the last image token.
    tails: the text behind it, where the prompt may go on.
    deferred: warnings, by what they are about, that hold only if it does not.
    static: what its steps share on a static cache (a `compiled.StaticStep`).
    streams: second streams, by name (`branches.Stream`).
    """

    owner: int
    batch: int
    length: int = 0
    start: int = 0
    end: int = 0
    resumed: int = 0
    answered: bool = False
    keys: TokenMasks = field(default_factory=TokenMasks)
    states: dict[str, State] = field(default_factory=dict)
    history: dict[str, tuple[Collection[int], int]] = field(default_factory=dict)
    step: Any = None
    pictured: bool = True
    stock: int = 0
    open: bool = False
    edge: int = 0
    tails: list[Tail] = field(default_factory=list)
    deferred: list[tuple[str, str]] = field(default_factory=list)
    static: Any = None
    streams: dict[str, Any] = field(default_factory=dict)

    def select(self, index: Tensor) -> None:
        """Follows the cache when its samples are reordered, picked or repeated; index `[B]`."""
        for state in (self.keys, *self.states.values(), *self.streams.values()):
            state.select(index)
        for tail in self.tails:
            tail.select(index, self.batch)
        if len(index) != self.batch:
            self.batch, self.step, self.static = len(index), None, None
        elif self.static is not None:
            self.static.select(self, index)

    def follow(self, name: str, layers: Collection[int], past: int) -> None:
        """Notes that a method acts in these layers now. Raises PatchError if it missed tokens."""
        known, length = self.history.get(name, ((), 0))
        if past and (known is not layers or length < past):
            missed = [layer for layer in layers if layer not in known]
            if length < self.stock:
                raise PatchError(
                    f"{name} does not know the first {past} tokens: they were read without an "
                    "image, and so as in the stock model. Give the whole conversation, with its "
                    "image, without a cache."
                )
            if missed or length < past:
                where = f"layer {missed[0]}" if missed else "every layer"
                raise PatchError(
                    f"{name} is on, but was off in {where} while a part of the first {past} tokens "
                    "was read, so it does not know them. Switch methods and layers before a prompt."
                )
        self.history[name] = (layers, self.length)

    def grow(self, name: str, new: Tensor, past: int) -> Tensor:
        """The mask `name` `[B, past + S]` with the new tokens' `[B, S]` behind the cached ones."""
        buffer = append(getattr(self.keys, name), new, past)
        setattr(self.keys, name, buffer)
        return buffer[:, : past + new.shape[1]]

    def whole(self, new: PromptMasks) -> PromptMasks:
        """The prompt read last with its `new` part, and the part that is cached, which it keeps."""
        read = new.past - self.start
        ids, valid = new.ids, new.valid
        if read:
            before = self.keys.ids
            if ids is not None:
                both = None if before is None else (before[:, :read], ids.to(before.device))
                ids = None if both is None else torch.cat(both, 1)
            valid = torch.cat((self.keys.valid[:, :read], valid), 1)
        self.keys.valid = valid
        self.keys.ids = ids
        return PromptMasks(self.start, ids, new.images, valid)

    def find_edge(self, past: int) -> int | None:
        """Which of the rows behind `past` tokens is the last one with an image token, in the sample
        whose image ends first; None if some sample with an image has none of it there.
        """
        if not self.pictured:
            return None
        image = self.keys.image[:, past : self.length]
        places = torch.arange(image.shape[1], device=image.device) + 1
        last = (image * places).amax(1).masked_fill(~self.keys.seen, image.shape[1] + 1)
        edge = int(last.min()) - 1
        if edge < 0:
            return None
        self.edge = past + edge + 1
        return edge

    def cut(self, past: int) -> None:
        """Forgets the masks of tokens that were taken out of the cache again."""
        for name in KEY_MASKS:
            getattr(self.keys, name)[:, past:] = False

    def ahead(self, name: str, total: int) -> Tensor:
        """The mask `name` `[B, total]` where the tokens not seen yet are none of it."""
        buffer: Tensor = getattr(self.keys, name)
        if buffer.shape[1] < total:
            buffer = append(buffer, torch.zeros_like(buffer), buffer.shape[1])
            setattr(self.keys, name, buffer)
        return buffer[:, :total]


class _Selecting:
    """Stands in for a method of a cache that moves its samples, so that what is remembered follows.

    Holds the cache weakly: a cycle would keep its memory until the garbage collector runs.
    """

    def __init__(self, cache: Any, generation: GenerationState, name: str) -> None:
        self.cache, self.generation, self.name = weakref.ref(cache), generation, name

    def __call__(self, which: Any) -> None:
        """which: the samples by index; or, as one number, how often each is repeated."""
        cache: Any = self.cache()
        getattr(type(cache), self.name)(cache, which)
        if isinstance(which, int):
            which = torch.arange(self.generation.batch).repeat_interleave(which)
        self.generation.select(which)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Selecting, (self.cache(), self.generation, self.name)


class _Cropping(_Selecting):
    """The same for the method of a static cache that takes out its last tokens; what a cache holds
    that is not static is asked at every forward.
    """

    def __call__(self, tokens: int) -> None:
        """tokens: how many, as a number below 0."""
        cache: Any = self.cache()
        length = cached(cache, 1) - abs(tokens)
        getattr(type(cache), self.name)(cache, tokens)
        self.generation.cut(length)
        self.generation.length = length
        if self.generation.static is not None:
            self.generation.static.length.tensor.fill_(length)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Cropping, (self.cache(), self.generation, self.name)


SELECTING = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
"""Methods of a cache that reorder, repeat or pick its samples."""


def attach(cache: Any, generation: GenerationState) -> None:
    """Lets a generation travel with its cache."""
    before: GenerationState | None = getattr(cache, "vlm_patch", None)
    if before is not None and (before.owner, before.batch) == (generation.owner, generation.batch):
        generation.static = before.static  # the addresses stay, also for a graph that was captured
    cache.vlm_patch = generation
    for name in SELECTING:
        if hasattr(type(cache), name):
            setattr(cache, name, _Selecting(cache, generation, name))
    kind = type(cache)
    if issubclass(kind, StaticCache) and hasattr(kind, "crop"):
        cache.crop = _Cropping(cache, generation, "crop")


def cached(cache: Any, rows: int) -> int:
    """How many tokens the cache holds; while a static one generates, known without asking it,
    since that would wait for the device.
    """
    if cache is None:
        return 0
    generation: GenerationState | None = getattr(cache, "vlm_patch", None)
    if generation is not None and generation.static is not None and generation.static.ran:
        generation.static.catch_up(generation)
    if rows == 1 and generation is not None and isinstance(cache, StaticCache):
        return generation.length
    return int(cache.get_seq_length())
