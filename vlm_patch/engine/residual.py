"""How the residual stream is edited: what a block's MLP adds to it, and what leaves the block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlm_patch.engine.attention import HANDLER_ARGUMENT, ThreadState
from vlm_patch.engine.hooks import Hook, MissingHandler
from vlm_patch.engine.readout import Readout
from vlm_patch.engine.rows import ActiveMethod, Editing, Watching
from vlm_patch.errors import PatchError, UnsupportedModelError
from vlm_patch.method import ForwardContext, Method
from vlm_patch.models.info import Decoder, Layer

MLP_NAMES = ("mlp", "feed_forward", "ffn", "ff", "moe", "block_sparse_moe")
"""What the MLP of a block is called in the models of transformers."""

edits_mlp: Callable[[Method], bool] = attrgetter("edits_mlp")
edits_hidden: Callable[[Method], bool] = attrgetter("edits_hidden")
Edit: TypeAlias = Callable[[ActiveMethod, Tensor, ForwardContext], Tensor]


class ResidualHook(Hook):
    """A forward hook of a block or an MLP that costs next to nothing while this thread runs
    nothing. `call` is given the handler, the module's first argument and its output.
    """

    def __init__(self, call: Callable[..., Any], now: ThreadState) -> None:
        super().__init__(call)
        self.now = now

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run = kwargs.get(HANDLER_ARGUMENT, self.now.run)
        if run is None:
            return None
        entering = args[0] if args else kwargs.get("hidden_states")
        return super().__call__(run, entering, output)


class EnteringHook(ResidualHook):
    """The same as a hook that is called before a block."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        return super().__call__(module, args, kwargs, output)


def install(
    decoder: Decoder, methods: Sequence[Method], now: ThreadState, undo: ExitStack, split: bool
) -> None:
    """Puts hooks on the blocks, and on their MLPs, if a method reads or edits there; closing `undo`
    takes them off. split: see `Readout`. Raises UnsupportedModelError for a block without an MLP,
    or a decoder without a norm, to be found.
    """
    for method in methods:
        if method.reads_logits:
            readout = Readout.of(decoder.module, decoder.generator, method.name, split)
            for layer in decoder.layers:
                show = EnteringHook(partial(_entering, readout, layer.index), now)
                handle = layer.block.register_forward_pre_hook(show, with_kwargs=True)
                undo.callback(handle.remove)
            break
    of_mlp = [method.name for method in filter(edits_mlp, methods)]
    if not of_mlp and not any(map(edits_hidden, methods)):
        return
    for layer in decoder.layers:
        hooks = [(layer.block, _leaving)]
        if of_mlp:
            hooks.insert(0, (_mlp_of(layer, of_mlp[0]), _behind_mlp))
        for module, call in hooks:
            hook = ResidualHook(partial(call, layer.index), now)
            undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)


def _mlp_of(layer: Layer, name: str) -> nn.Module:
    children = dict(layer.block.named_children())
    found = [child for child in MLP_NAMES if child in children]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name} edits what the MLP of a block adds to the residual stream: expected one of "
            f"{list(MLP_NAMES)} in {type(layer.block).__name__}, found {found or list(children)}"
        )
    return children[found[0]]


def _entering(readout: Readout, layer: int, run: Any, hidden: Tensor, output: Any) -> None:
    """Shows what the model would say of what enters a block."""
    actives = _acting(run, layer, attrgetter("reads_logits"))
    if actives:
        forward = run.forward.on(hidden.device)
        rows = hidden[:, max(0, forward.position.prompt_rows - 1) :]
        with _without_autocast(hidden.device.type):
            logits = readout(rows)
            for active in actives:
                active.method.observe_readout(layer, logits, forward, active.state)


def _leaving(layer: int, run: Any, entering: Any, output: Any) -> Any:
    """What leaves a block, edited; shown to an extra forward pass."""
    if isinstance(run, Watching):
        if run.watcher.output is not None:
            run.watcher.output(layer, _first(output))
        return None

    def edit(active: ActiveMethod, hidden: Tensor, forward: ForwardContext) -> Tensor:
        return active.method.edit_hidden(layer, hidden, forward, active.state)

    return _edited(layer, run, _acting(run, layer, edits_hidden), output, edit)


def _behind_mlp(layer: int, run: Any, entering: Tensor, output: Any) -> Any:
    """What an MLP gives, edited."""
    if isinstance(run, MissingHandler):
        if not _acting(run.handed, layer, edits_mlp):
            return None
        raise PatchError(
            "layers are run again for their gradients, where what a method does behind an MLP "
            "could not be done again: train without gradient checkpointing, or inside "
            "`with patch.disabled():`"
        )

    def edit(active: ActiveMethod, added: Tensor, forward: ForwardContext) -> Tensor:
        hidden = entering.view(added.shape)
        return active.method.edit_mlp(layer, added, hidden, forward, active.state)

    return _edited(layer, run, _acting(run, layer, edits_mlp), output, edit)


def _acting(run: Any, layer: int, edits: Callable[[Method], bool]) -> list[ActiveMethod]:
    """The methods that edit here in this forward."""
    if not isinstance(run, Editing):
        return []
    return [one for one in run.actives if layer in one.heads and edits(one.method)]


def _edited(layer: int, run: Any, actives: list[ActiveMethod], output: Any, edit: Edit) -> Any:
    """The output of a module after these methods; None if there are none."""
    if not actives:
        return None
    before = _first(output)
    forward = run.forward.on(before.device)
    # mixtures of experts may give their rows without the batch
    hidden = before.view(*forward.valid.shape, -1)
    kept = (forward.valid & forward.seen[:, None])[..., None]
    with _without_autocast(hidden.device.type):
        for active in actives:
            _check_whole(active, layer)
            new = edit(active, hidden, forward)
            hidden = torch.where(kept, new.to(hidden.dtype), hidden)
    hidden = hidden.view(before.shape)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _first(output: Any) -> Tensor:
    """The hidden states in what a module returns, beside which there may be router logits."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _check_whole(active: ActiveMethod, layer: int) -> None:
    if active.heads[layer] is not None:
        raise PatchError(
            f"{active.method.name} edits the residual stream, which has no heads, but only some "
            f"heads of layer {layer} are on: switch the whole layer, "
            f'patch.heads["{active.method.name}"][{layer}] = True or False'
        )


def _without_autocast(device: str) -> Any:
    """Autocast is for the stock modules; edits keep their precision."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
