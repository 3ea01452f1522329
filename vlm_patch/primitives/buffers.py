"""Tensors that are reused: casts that copy only where they must, buffers that grow by doubling."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs a microsecond even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def has_room(buffer: Tensor, total: int) -> bool:
    """Whether `total` entries can be written to the buffer `[..., N]` as it is."""
    writable = not buffer.is_inference() or torch.is_inference_mode_enabled()
    return writable and buffer.shape[-1] >= total


def append(buffer: Tensor | None, new: Tensor, past: int, rest: Tensor | None = None) -> Tensor:
    """The buffer `[B, ..., at least past + S]` with `new` `[B, ..., S]` behind its first `past`
    entries; None is an empty one.

    Writes into `buffer` where it has room, so that a step of decoding writes one column; a full
    one is replaced by one of twice the size. rest `[B, ..., 1]`: what entries hold that were not
    written yet, else 0. Keep what is returned:

        state.groups = append(state.groups, groups, forward.position.past)
    """
    total = past + new.shape[-1]
    if buffer is None or not has_room(buffer, total):
        larger = new.new_zeros(*new.shape[:-1], max(256, 2 * total))
        if rest is not None:
            larger.copy_(rest)
        if buffer is not None:
            larger[..., :past] = buffer[..., :past]
        buffer = larger
    buffer.narrow(-1, past, new.shape[-1]).copy_(new)
    return buffer
