"""What attention and cache do while one forward of the decoder reads two prompts: a prompt's S
rows, and T rows of a second one behind them (`ExtraPrompt`).

Neither sees the other. The decoder makes positions and masks as for one prompt of S + T rows, and
the attention hides from each what belongs to the other. Caches, methods and whoever called the
decoder see the S rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_patch.engine.attention import Call, ForwardHandler
from vlm_patch.engine.rows import Watching


@dataclass
class Packed(ForwardHandler):
    """What attention serves while the decoder reads both prompts.

    inputs: what the decoder is given. rows, extra: S and T. watching: looks at the second prompt.
    cache: of the prompt; None without one. at_once: one call of the kernel reads both prompts, else
    each has its own. prompt: what is done in the prompt's rows.
    """

    inputs: dict[str, Any]
    rows: int
    extra: int
    watching: Watching
    cache: Any
    at_once: bool
    prompt: ForwardHandler | None = None
    _masks: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor]] = field(
        default_factory=dict
    )

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The output `[B, S + T, H, Dv]` of both, and the weights of the prompt."""
        keys = call.key.shape[2] - self.extra
        whole = first = last = None
        if self.at_once:
            whole, _ = _stock(call, self._block_mask(call, keys))
            first, last = whole[:, : self.rows], whole[:, self.rows :]
        behind = self._watch(call, keys, last)
        prompt = _part(call, slice(None, self.rows), slice(None, keys), first)
        assert self.prompt is not None
        output, weights = self.prompt.attend(prompt)
        if whole is not None and output is first:  # edited in place, if at all
            return whole, weights
        return torch.cat((output, behind), 1), weights

    def _watch(self, call: Call, keys: int, output: Tensor | None) -> Tensor:
        """The output `[B, T, H, Dv]` of the second prompt, which may be known, once it is shown."""
        watcher = self.watching.watcher
        if output is not None and watcher.weights is None:  # a part of the call takes longer
            if watcher.heads is not None:
                watcher.heads(call.layer, output)
            return output
        part = _part(call, slice(self.rows, None), slice(keys, None), output)
        return self.watching.attend(part)[0]

    def _block_mask(self, call: Call, keys: int) -> Tensor:
        """The layer's mask with what lies between the prompts hidden; once for all its layers."""
        known = id(call.mask), call.query.device
        if known not in self._masks:
            if call.mask is None:
                rows = torch.arange(call.query.shape[2], device=call.query.device)
                seen = rows.new_ones(len(rows), call.key.shape[2], dtype=torch.bool)
                later = call.unseen(rows)
                mask = (seen if later is None else ~later)[None, None]
            else:
                mask = call.mask.clone()
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask[:, :, : self.rows, keys:] = hidden
            mask[:, :, self.rows :, :keys] = hidden
            self._masks[known] = call.mask, mask  # both, so that no other mask gets this id
        return self._masks[known][1]

    def start(self) -> None:
        """From here on the cache keeps the prompt's rows alone."""
        if self.cache is not None:
            self.cache.update = _PromptUpdate(self.cache, self.extra, self.at_once)

    def finish(self, output: Any) -> Any:
        """The decoder's output without the second prompt, and its cache as it was."""
        if self.cache is not None:
            vars(self.cache).pop("update", None)
        if isinstance(output, tuple):
            return tuple(map(self._cut, output))
        for name, value in (output or {}).items():
            output[name] = self._cut(value)
        return output

    def _cut(self, value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(self._cut, value))
        rows = self.rows + self.extra
        hidden = isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == rows
        return value[:, : self.rows] if hidden else value


def _part(call: Call, rows: slice, keys: slice, output: Tensor | None) -> Call:
    """The call of some rows and keys, whose stock output may be known."""
    part = Call(
        call.layer,
        call.module,
        call.query[:, :, rows],
        call.key[:, :, keys],
        call.value[:, :, keys],
        None if call.mask is None else call.mask[:, :, rows, keys],
        call.options,
        lambda: _stock(part, part.mask) if output is None else (output, None),
        call.kernel,
    )
    return part


def _stock(call: Call, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert call.kernel is not None
    return call.kernel(call.query, call.key, call.value, mask)


@dataclass
class _PromptUpdate:
    """Stands in for a cache's `update`, and keeps the last `extra` rows out of it.

    in_place: as views of what is computed, which takes the memory of these rows and no time.
    """

    cache: Any
    extra: int
    in_place: bool

    def __call__(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        extra = self.extra
        both, more = (key_states, value_states), (layer_idx, *args)
        if self.in_place and _is_plain(self.cache, layer_idx):
            found: tuple[Tensor, Tensor] = type(self.cache).update(
                self.cache, *both, *more, **kwargs
            )
            self.cache.layers[layer_idx].crop(-extra)
            return found
        first = [states[:, :, :-extra] for states in both]
        key, value = type(self.cache).update(self.cache, *first, *more, **kwargs)
        behind = [states[:, :, -extra:] for states in both]
        return torch.cat((key, behind[0]), 2), torch.cat((value, behind[1]), 2)


def _is_plain(cache: Any, layer: int) -> bool:
    """Whether a layer of a cache keeps what it is given, all of it and nothing else."""
    known = cache.layers[layer : layer + 1]  # layers may be added as they are needed
    plain = all(type(kept).__name__ == "DynamicLayer" for kept in known)
    return type(cache) is DynamicCache and plain
