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
from vlm_patch.method import Memory, append

KEY_MASKS = ("image", "query", "content")


@dataclass
class Generation:
    """What is remembered of one generation; it travels with the cache, also through a deep copy.

    owner: the patch that made it. length: tokens seen so far. start, end: the prompt read last, in
    tokens from the beginning. keys: the masks "image", "query" and "content" of the tokens, and
    "seen" `[B]`, the samples with an image. memory: of each method, by name. history: the layers in
    which a method was on, and up to which length. step: what is done at every generated token (an
    `editing.Editing`). pictured: whether any sample has an image; without one everything is left
    stock.
    """

    owner: int
    batch: int
    length: int = 0
    start: int = 0
    end: int = 0
    keys: Memory = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    history: dict[str, tuple[Collection[int], int]] = field(default_factory=dict)
    step: Any = None
    pictured: bool = True

    def reorder(self, index: Tensor) -> None:
        """Follows the cache when beams are reordered; index `[B]`."""
        for memory in (self.keys, *self.memory.values()):
            for key, tensor in memory.items():
                memory[key] = tensor.index_select(0, index.to(tensor.device))

    def follow(self, name: str, layers: Collection[int], past: int) -> None:
        """Notes that a method acts in these layers now. Raises PatchError if it missed tokens."""
        known, length = self.history.get(name, ((), 0))
        if past and (known is not layers or length < past):
            missed = [layer for layer in layers if layer not in known]
            if missed or length < past:
                where = f"layer {missed[0]}" if missed else "every layer"
                raise PatchError(
                    f"{name} is on, but was off in {where} while a part of the first {past} tokens "
                    "was read, so it does not know them. Switch methods and layers before a prompt."
                )
        self.history[name] = (layers, self.length)

    def grow(self, name: str, new: Tensor, past: int) -> Tensor:
        """The mask `name` `[B, past + S]` with the new tokens' `[B, S]` behind the cached ones."""
        return append(self.keys, (name, 0), new, past)[:, : past + new.shape[1]]

    def cut(self, past: int) -> None:
        """Forgets the masks of tokens that were taken out of the cache again."""
        for name in KEY_MASKS:
            self.keys[name, 0][:, past:] = False

    def ahead(self, name: str, total: int) -> Tensor:
        """The mask `name` `[B, total]` where the tokens not seen yet are none of it."""
        buffer = self.keys[name, 0]
        if buffer.shape[1] < total:
            buffer = append(self.keys, (name, 0), torch.zeros_like(buffer), buffer.shape[1])
        return buffer[:, :total]


class _Reordering:
    """Stands in for `cache.reorder_cache`, so that what is remembered follows the beams.

    Holds the cache weakly: a cycle would keep its memory until the garbage collector runs.
    """

    def __init__(self, cache: Any, generation: Generation) -> None:
        self.cache, self.generation = weakref.ref(cache), generation

    def __call__(self, beam_idx: Tensor) -> None:
        cache: Any = self.cache()
        type(cache).reorder_cache(cache, beam_idx)
        self.generation.reorder(beam_idx)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Reordering, (self.cache(), self.generation)


def attach(cache: Any, generation: Generation) -> None:
    """Lets a generation travel with its cache."""
    cache.vlm_patch = generation
    cache.reorder_cache = _Reordering(cache, generation)


def cached(cache: Any, rows: int) -> int:
    """How many tokens the cache holds; while a static one generates, known without asking it,
    since that would wait for the device.
    """
    if cache is None:
        return 0
    generation: Generation | None = getattr(cache, "vlm_patch", None)
    if rows == 1 and generation is not None and isinstance(cache, StaticCache):
        return generation.length
    return int(cache.get_seq_length())
