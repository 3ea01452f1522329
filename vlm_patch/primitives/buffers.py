"""Tensors that are reused: casts that copy only where they must, buffers that grow by doubling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_patch.errors import PatchError


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs a microsecond even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def has_room(buffer: Tensor, total: int) -> bool:
    """Whether `total` entries can be written to the buffer `[..., N]` as it is."""
    writable = not buffer.is_inference() or torch.is_inference_mode_enabled()
    return writable and buffer.shape[-1] >= total


@dataclass
class StaticLength:
    """The number of tokens in a static cache as torch.compile must see it: a tensor, so that one
    graph serves every step. `append` and `ForwardContext.newest` take it for a number.

    tensor: `[1]` (long). capacity: how many tokens the cache can hold.
    """

    tensor: Tensor
    capacity: int

    def __add__(self, tokens: int) -> StaticLength:
        return StaticLength(self.tensor + tokens, self.capacity) if tokens else self

    def __sub__(self, tokens: int) -> StaticLength:
        return self + -tokens

    def write(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        """The buffer `[B, ..., capacity]` with `new` `[B, ..., S]` behind its first entries."""
        if buffer is None or buffer.shape[-1] != self.capacity:
            found = None if buffer is None else list(buffer.shape)
            raise PatchError(
                f"a compiled step writes behind the keys of a tensor of shape {found}, expected "
                f"one for all {self.capacity} keys of the static cache: name its field in "
                "`per_key` of the method's State"
            )
        places = self.tensor.to(buffer.device)
        if new.shape[-1] > 1:
            places = places + torch.arange(new.shape[-1], device=buffer.device)
        buffer.index_copy_(-1, places, cast(new, buffer.dtype).contiguous())
        return buffer

    def newest(self, mask: Tensor, keys: int) -> Tensor:
        """Of `[..., capacity]` the entries of the last `keys` keys, the new token's included, as a
        static cache with a sliding window holds them.
        """
        if keys == mask.shape[-1]:
            return mask
        first = (self.tensor.to(mask.device) + 1 - keys).clamp_min(0)
        return mask.index_select(-1, first + torch.arange(keys, device=mask.device))


def append(buffer: Tensor | None, new: Tensor, past: Any) -> Tensor:
    """The buffer `[B, ..., at least past + S]` with `new` `[B, ..., S]` behind its first `past`
    entries; None is an empty one.

    Writes into `buffer` where it has room, so that a step of decoding writes one column; a full
    one is replaced by one of twice the size. Keep what is returned:

        state.groups = append(state.groups, groups, forward.position.past)
    """
    if isinstance(past, StaticLength):
        return past.write(buffer, new)
    total = past + new.shape[-1]
    if buffer is None or not has_room(buffer, total):
        larger = new.new_zeros(*new.shape[:-1], max(256, 2 * total))
        if buffer is not None:
            larger[..., :past] = buffer[..., :past]
        buffer = larger
    buffer.narrow(-1, past, new.shape[-1]).copy_(new)
    return buffer
