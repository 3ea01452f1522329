"""How a layer's attention is reached: one function, and what it shows of a call.

It is registered under the library's own name, and only modules that were patched ask for it by that
name: each gets a shallow copy of its config. Masks, caches, other layers and the vision tower go on
seeing the stock name.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_patch.errors import PatchError, UnsupportedModelError
from vlm_patch.models.info import Layer
from vlm_patch.primitives.buffers import cast

NAME = "vlm_patch"
SLOT = "_vlm_patch"
CONFIG = "_vlm_patch_config"
HANDLER_ARGUMENT = "vlm_patch_run"
"""The argument in which a decoder hands down its `ForwardHandler` under gradient checkpointing:
layers are run again after the forward, perhaps by another thread."""
UNKNOWN_TERMS = ("s_aux", "sinks", "position_bias", "indices", "block_indices", "write_index")
"""Arguments of rarer attention kinds, whose rows could not be recomputed rightly."""

Stock: TypeAlias = Callable[[], tuple[Tensor, Tensor | None]]


@dataclass
class Call:
    """One call of a layer's attention: query `[B, H, S, D]`, key and value `[B, KV, K, D]`."""

    layer: int
    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    stock: Stock

    def without_tail(self, keys: int) -> Call:
        """The call without the unused rest of a static cache, behind its first `keys` entries."""
        if self.key.shape[2] <= keys:
            return self
        mask = self.mask[..., :keys] if self.mask is not None else None
        return replace(self, key=self.key[:, :, :keys], value=self.value[:, :, :keys], mask=mask)

    def weights(self, rows: Tensor) -> Tensor:
        """Attention weights `[B, H, R, K]` of the rows `[R]`, in float32 or the model's float64."""
        return softmax(self.scores(rows))

    def scores(self, rows: Tensor) -> Tensor:
        """What the softmax of the rows `[R]` is taken of, `[B, H, R, K]`: scaled, capped and
        masked.
        """
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        batch, heads, _, size = self.query.shape
        groups, keys = self.key.shape[1:3]
        query = self.query if rows.shape[0] == self.query.shape[2] else self.query[:, :, rows]
        packed = cast(query, dtype).reshape(batch * groups, -1, size)
        key = cast(self.key, dtype).reshape(batch * groups, keys, size).transpose(1, 2)
        # baddbmm scales as it multiplies; with beta=0 its first argument is not read
        scores = torch.baddbmm(packed.new_empty(1, 1, 1), packed, key, beta=0, alpha=self.scaling)
        scores = scores.view(batch, heads, -1, keys)
        softcap = self.options.get("softcap")
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = self._hidden(rows)
        if hidden is not None:
            # the lowest number, not -inf: a row of padding sees nothing, and must not become NaN
            scores = scores.masked_fill_(hidden, torch.finfo(dtype).min)
        elif self.mask is not None:
            scores = scores + self._mask_of(rows).to(dtype)
        return scores

    def unseen(self, rows: Tensor) -> Tensor | None:
        """Where a row must not look, of any kind of mask; see `_hidden`."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return self._hidden(rows)
        mask: Tensor = self._mask_of(rows)
        return mask <= torch.finfo(mask.dtype).min / 2

    def output(self, weights: Tensor) -> Tensor:
        """Head outputs `[B, R, H, Dv]` of weights `[B, H, R, K]`."""
        batch, heads, rows, keys = weights.shape
        packed = weights.reshape(batch * self.value.shape[1], -1, keys)
        output = torch.bmm(packed, cast(self.value, weights.dtype).flatten(0, 1))
        return cast(output.view(batch, heads, rows, -1).transpose(1, 2), self.query.dtype)

    @property
    def scaling(self) -> float:
        """What scores are multiplied by."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)

    def _mask_of(self, rows: Tensor) -> Any:
        mask: Any = self.mask
        return mask if rows.shape[0] == mask.shape[2] else mask[:, :, rows]

    def _hidden(self, rows: Tensor) -> Tensor | None:
        """Where a row must not look, broadcastable to `[B, H, R, K]`; None without a mask, or with
        an additive one.
        """
        if self.mask is not None:
            return ~self._mask_of(rows) if self.mask.dtype == torch.bool else None
        new, keys = self.query.shape[2], self.key.shape[2]
        causal = self.options.get("is_causal")
        if causal is None:
            causal = getattr(self.module, "is_causal", True)
        if new == 1 or not causal:
            return None
        return torch.arange(keys, device=rows.device) > (rows + keys - new)[:, None]


def softmax(scores: Tensor) -> Tensor:
    """Weights `[B, H, R, K]` of scores, in their memory where autograd allows it."""
    return scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)


class ForwardHandler(Protocol):
    """What happens in the attention during one forward."""

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]: ...


class Thread(Protocol):
    """What a thread does in the layers of a slot."""

    @property
    def run(self) -> ForwardHandler | None: ...

    @property
    def joint(self) -> Any: ...


class ThreadState(threading.local):
    """What this thread does at the moment.

    run: what attention serves. inside: the decoder runs for a pass of our own. first: the output of
    a pass that did all of the prompt but its last token. joint: what splits a batch of several
    streams (`joint.JointStep`).
    """

    run: ForwardHandler | None = None
    inside: bool = False
    first: Any = None
    joint: Any = None


def check(call: Call) -> None:
    """Raises where rows cannot be recomputed as the stock kernel computes them."""
    for name in UNKNOWN_TERMS:
        if call.options.get(name) is not None:
            raise UnsupportedModelError(
                f"layer {call.layer} passes {name!r} to its attention, which this library cannot "
                "edit; leave that layer out: wrap(model, ..., layers=...)"
            )
    if call.mask is not None and not isinstance(call.mask, Tensor):
        raise UnsupportedModelError(
            f"layer {call.layer} uses a {type(call.mask).__name__}: load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    if call.mask is not None and call.mask.ndim != 4:
        raise UnsupportedModelError(
            f"layer {call.layer} uses a {call.mask.ndim}-dimensional mask (a flash kernel): load "
            'the model with attn_implementation="sdpa" or "eager"'
        )
    if call.options.get("dropout") and call.module.training:
        raise PatchError("a patched model cannot train with attention dropout: call model.eval()")


class StockConfigView:
    """An attention module as its stock function must see it: with the config it came with."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.__dict__.update(_module=module, config=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_module" or name.startswith("__"):  # copying would otherwise recurse for ever
            raise AttributeError(name)
        return getattr(self._module, name)


class PatchSlot:
    """What a patched attention module carries. A deep copy or a pickle of it is empty: such a copy
    is a stock model.

    patch: the handle, so that a model whose handle was lost leads back to it.
    """

    def __init__(self, layer: int, now: Thread | None, patch: Any = None) -> None:
        self.layer, self.now, self.patch = layer, now, patch

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchSlot:
        return PatchSlot(self.layer, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return PatchSlot, (self.layer, None)


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function for patched modules: `[B, H, S, D]` in, `[B, S, H, Dv]`
    out. torch.compile is kept out of this frame alone; where nothing is on, it sees the stock one.
    """
    slot: PatchSlot = module.__dict__[SLOT]
    if slot.now is not None and slot.now.joint is not None:
        joint: tuple[Tensor, Tensor | None] = slot.now.joint.attend(
            attention, module, query, key, value, options
        )
        return joint
    config = module.__dict__[CONFIG]
    # past the lookups that transformers puts before every attribute of a config: they cost almost
    # as much as the rest of this function
    name = object.__getattribute__(config, "_attn_implementation_internal")
    try:
        kernel = ALL_ATTENTION_FUNCTIONS[name]
    except KeyError:
        kernel = sys.modules[type(module).__module__].eager_attention_forward
    # the plain kernels do not look at the config, and a view costs more than their call
    shown = module if name in ("sdpa", "eager") else StockConfigView(module, config)
    run: ForwardHandler | None = options.pop(HANDLER_ARGUMENT, None)
    if run is None and slot.now is not None:
        run = slot.now.run
    if run is None:
        stock: tuple[Tensor, Tensor | None] = kernel(
            shown, query, key, value, attention_mask, **options
        )
        return stock
    check_kernel(slot.layer, name)
    # this kernel leaves the cap out, or refuses it in newer versions of transformers
    capped = name == "sdpa" and "softcap" in options
    seen = {**options, "softcap": None} if capped else options
    call = Call(
        slot.layer,
        module,
        query,
        key,
        value,
        attention_mask,
        seen,
        lambda: kernel(shown, query, key, value, attention_mask, **options),
    )
    edited: tuple[Tensor, Tensor | None] = _attend(run, call)
    return edited


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(run: ForwardHandler, call: Call) -> tuple[Tensor, Tensor | None]:
    """Under torch.compile this runs as it stands, since what it does differs from call to call."""
    if torch.is_autocast_enabled(call.query.device.type):
        return _outside_autocast(run, call)
    return run.attend(call)


def _outside_autocast(run: ForwardHandler, call: Call) -> tuple[Tensor, Tensor | None]:
    """Autocast is for the stock kernel; rows that are edited keep float32."""
    device, stock = call.query.device.type, call.stock
    dtype = torch.get_autocast_dtype(device)

    def cast() -> tuple[Tensor, Tensor | None]:
        with torch.autocast(device, dtype=dtype):
            return stock()

    with torch.autocast(device, enabled=False):
        return run.attend(replace(call, stock=cast))


AttentionInterface.register(NAME, attention)


def patch_on(layer: Layer) -> Any:
    """The patch that sits on this layer, if any; what a deep copy left behind is none."""
    slot: PatchSlot | None = layer.attention.__dict__.get(SLOT)
    return None if slot is None else slot.patch


def check_kernel(layer: int, name: str) -> None:
    """Raises UnsupportedModelError for an attention implementation that methods cannot edit."""
    if name == "flex_attention":
        raise UnsupportedModelError(
            f"layer {layer} of the decoder runs flex_attention, whose masks are functions and "
            "whose rows no method can edit: load the model with from_pretrained(..., "
            'attn_implementation="sdpa"), or switch it by '
            'model.set_attn_implementation("sdpa")'
        )


def install(layer: Layer, now: Thread, undo: ExitStack, patch: Any = None) -> None:
    """Lets a layer's attention go through this file; closing `undo` restores it exactly."""
    module: Any = layer.attention
    state = module.__dict__
    config = state.pop(CONFIG, module.config)  # left behind by a deep copy of a patched model
    own = copy.copy(config)
    own._attn_implementation_internal = NAME
    state[SLOT], state[CONFIG] = PatchSlot(layer.index, now, patch), config
    undo.callback(state.pop, SLOT)
    undo.callback(state.pop, CONFIG)
    module.config = own
    undo.callback(setattr, module, "config", config)
