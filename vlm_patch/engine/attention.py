"""How a layer's attention is reached: one function, and what it shows of a call.

It is registered under the library's own name, and only modules that were patched ask for it by that
name: each gets a shallow copy of its config. Masks, caches, other layers and the vision tower go on
seeing the stock name.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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

REASON = (
    "vlm_patch: of a patched model only a step of one token on a StaticCache can be traced whole, "
    "behind a prompt that the same methods read without torch.compile. Read prompts with the model "
    "itself and only the tokens behind them with the compiled one, as generate() does, or compile "
    "with fullgraph=False. While a method edits logits, no step is traced: compile with "
    "fullgraph=False, or run inside `with patch.disabled():`"
)
"""What fullgraph=True says of everything else."""
# None where no compiler is at work in this thread; it is not public, and can be done without
active_compiler: Callable[[], Any] | None
active_compiler = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)

Stock: TypeAlias = Callable[[], tuple[Tensor, Tensor | None]]
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""The stock attention of given query, key, value and mask."""


@dataclass
class Call:
    """One call of a layer's attention: query `[B, H, S, D]`, key and value `[B, KV, K, D]`.

    stock: what the stock attention makes of it. kernel: the same of any query, key, value and mask.
    """

    layer: int
    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    stock: Stock
    kernel: Kernel | None = None

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

    @property
    def causal(self) -> bool:
        """Whether rows do not see the keys behind them, where there is no mask."""
        causal = self.options.get("is_causal")
        if causal is None:
            causal = getattr(self.module, "is_causal", True)
        return bool(causal) and self.query.shape[2] > 1

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
        if not self.causal:
            return None
        return torch.arange(keys, device=rows.device) > (rows + keys - new)[:, None]


def softmax(scores: Tensor) -> Tensor:
    """Weights `[B, H, R, K]` of scores, in their memory where autograd allows it."""
    return scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)


class ForwardHandler(Protocol):
    """What happens in the attention during one forward. idle: the layers in which nothing does."""

    idle: Collection[int] = ()

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]: ...

    def attend_row(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """The head outputs `[B, 1, H, Dv]` of a generated token, where nothing but kernels is asked
        for; None where `attend` must be.
        """
        return None


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
    streams (`joint.JointStep`). settle: what follows a forward on a static cache.
    """

    run: ForwardHandler | None = None
    inside: bool = False
    first: Any = None
    joint: Any = None
    settle: Callable[[], None] | None = None


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


def outside(function: Callable[..., Any], recursive: bool = True) -> Callable[..., Any]:
    """The function as torch.compile leaves it out of its graph; fullgraph=True shows `REASON`."""
    disable: Any = torch.compiler.disable
    try:
        left_out: Callable[..., Any] = disable(function, recursive=recursive, reason=REASON)
    except TypeError:  # before torch 2.8
        left_out = disable(function, recursive=recursive)
    if active_compiler is None:
        return left_out

    def call(*args: Any, **kwargs: Any) -> Any:
        # what keeps a compiler out costs several microseconds a layer, also where none is at work
        if torch.compiler.is_dynamo_compiling() or active_compiler() is not None:
            return left_out(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@dataclass
class Graph:
    """What torch.compile sees of a patch, in plain attributes, since it cannot follow those of a
    thread.

    run: what attention serves in the step that is traced. off: by method, whether nothing of it is
    on.
    """

    run: ForwardHandler | None = None
    off: dict[str, bool] = field(default_factory=dict)


class PatchSlot:
    """What a patched attention module carries. A deep copy or a pickle of it is empty: such a copy
    is a stock model.

    patch: the handle, so that a model whose handle was lost leads back to it.
    """

    def __init__(
        self, layer: int, now: Thread | None, patch: Any = None, graph: Graph | None = None
    ) -> None:
        self.layer, self.now, self.patch = layer, now, patch
        self.graph = Graph() if graph is None else graph

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchSlot:
        return PatchSlot(self.layer, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return PatchSlot, (self.layer, None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function for patched modules: `[B, H, S, D]` in, `[B, S, H, Dv]`
    out. torch.compile sees it in the steps that it can trace (`compiled.py`) alone.
    """
    run = module.__dict__[SLOT].graph.run
    if run is None:
        served: tuple[Tensor, Tensor | None] = _untraced(
            module, query, key, value, attention_mask, **options
        )
        return served
    name = module.__dict__[CONFIG]._attn_implementation
    return _served(run, name, module, query, key, value, attention_mask, options)


def _in_thread(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention` in the forward that this thread runs. torch.compile is kept out of this frame and
    of edits; where nothing is on, it sees the stock function.
    """
    slot: PatchSlot = module.__dict__[SLOT]
    if slot.now is not None and slot.now.joint is not None:
        joint: tuple[Tensor, Tensor | None] = slot.now.joint.attend(
            attention, module, query, key, value, options
        )
        return joint
    run: ForwardHandler | None = options.pop(HANDLER_ARGUMENT, None)
    if run is None and slot.now is not None:
        run = slot.now.run
    if run is not None and slot.layer in run.idle:
        run = None
    elif run is not None and not torch.is_autocast_enabled(query.device.type):
        row = run.attend_row(slot.layer, query, key, value, attention_mask)
        if row is not None:
            return row, None
    # past the lookups that transformers puts before every attribute of a config: they cost almost
    # as much as the rest of this function
    config = module.__dict__[CONFIG]
    name = object.__getattribute__(config, "_attn_implementation_internal")
    return _served(run, name, module, query, key, value, attention_mask, options)


def _served(
    run: ForwardHandler | None,
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    slot: PatchSlot = module.__dict__[SLOT]
    config = module.__dict__[CONFIG]
    try:
        kernel = ALL_ATTENTION_FUNCTIONS[name]
    except KeyError:
        kernel = sys.modules[type(module).__module__].eager_attention_forward
    # the plain kernels do not look at the config, and a view costs more than their call
    shown = module if name in ("sdpa", "eager") else StockConfigView(module, config)
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
        lambda *given: kernel(shown, *given, **options),
    )
    if run is slot.graph.run:
        return _attend(run, call)
    edited: tuple[Tensor, Tensor | None] = _attend_untraced(run, call)
    return edited


def _attend(run: ForwardHandler, call: Call) -> tuple[Tensor, Tensor | None]:
    if torch.is_autocast_enabled(call.query.device.type):
        return _outside_autocast(run, call)
    return run.attend(call)


def _outside_autocast(run: ForwardHandler, call: Call) -> tuple[Tensor, Tensor | None]:
    """Autocast is for the stock kernel; rows that are edited keep float32."""
    device = call.query.device.type
    dtype = torch.get_autocast_dtype(device)

    def inside(run_stock: Any) -> Any:
        def cast(*given: Any) -> Any:
            with torch.autocast(device, dtype=dtype):
                return run_stock(*given)

        return cast

    with torch.autocast(device, enabled=False):
        return run.attend(replace(call, stock=inside(call.stock), kernel=inside(call.kernel)))


_attend_untraced = outside(_attend)
_untraced = outside(_in_thread, recursive=False)
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


def install(
    layer: Layer, now: Thread, undo: ExitStack, patch: Any = None, graph: Graph | None = None
) -> None:
    """Lets a layer's attention go through this file; closing `undo` restores it exactly."""
    module: Any = layer.attention
    state = module.__dict__
    config = state.pop(CONFIG, module.config)  # left behind by a deep copy of a patched model
    own = copy.copy(config)
    own._attn_implementation_internal = NAME
    state[SLOT], state[CONFIG] = PatchSlot(layer.index, now, patch, graph), config
    undo.callback(state.pop, SLOT)
    undo.callback(state.pop, CONFIG)
    module.config = own
    undo.callback(setattr, module, "config", config)
