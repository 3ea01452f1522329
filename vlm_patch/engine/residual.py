"""How the residual stream is edited: what a block's MLP adds to it, and what leaves the block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlm_patch.engine.attention import HANDLER_ARGUMENT, Graph, ThreadState
from vlm_patch.engine.compiled import TracedStep
from vlm_patch.engine.hooks import Hook, MissingHandler, untraced
from vlm_patch.engine.plans import ActiveMethod
from vlm_patch.engine.readout import Readout
from vlm_patch.engine.rows import Editing, Watching
from vlm_patch.errors import PatchError, UnsupportedModelError
from vlm_patch.method import ForwardContext, Method, State
from vlm_patch.models.info import Decoder, Layer

MLP_NAMES = ("mlp", "feed_forward", "ffn", "ff", "moe", "block_sparse_moe")
"""What the MLP of a block is called in the models of transformers."""

Acting: TypeAlias = list[tuple[ActiveMethod, State]]
Edit: TypeAlias = Callable[[Method, Tensor, ForwardContext, State], Tensor]


class ResidualHook(Hook):
    """A hook of a block or an MLP, before or behind it. `call` is given the handler, the module's
    first argument and its output, also in a step inside torch.compile.
    """

    def __init__(
        self,
        call: Callable[..., Any] | None,
        now: ThreadState | None = None,
        graph: Graph | None = None,
    ) -> None:
        super().__init__(call)
        self.now, self.graph = now or ThreadState(), graph or Graph()

    def __call__(self, module: nn.Module, args: Any, more: Any, output: Any = None) -> Any:
        handler = self.graph.run
        if handler is None or self.call is None:
            return untraced(self, module, args, more, output)
        return self.call(handler, _first_argument(args, more), output)

    def run(self, module: nn.Module, args: Any, more: Any, output: Any = None) -> Any:
        handler = more.get(HANDLER_ARGUMENT, self.now.run)
        if handler is None or self.call is None:
            return None
        return self.call(handler, _first_argument(args, more), output)

    def __deepcopy__(self, memo: dict[int, Any]) -> ResidualHook:
        return ResidualHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return ResidualHook, (None,)


def _first_argument(args: Any, more: Any) -> Any:
    return args[0] if args else more.get("hidden_states")


def install(
    decoder: Decoder,
    methods: Sequence[Method],
    around: tuple[ThreadState, Graph],
    undo: ExitStack,
    split: bool,
) -> None:
    """Puts hooks on the blocks, and on their MLPs, if a method reads or edits there; closing `undo`
    takes them off. around: what runs, and what is traced. split: see `Readout`. Raises
    UnsupportedModelError for a block without an MLP, or a decoder without a norm, to be found.
    """
    for method in methods:
        if method.reads_logits:
            readout = Readout.of(decoder.module, decoder.generator, method.name, split)
            for layer in decoder.layers:
                show = ResidualHook(partial(_entering, readout, layer.index), *around)
                handle = layer.block.register_forward_pre_hook(show, with_kwargs=True)
                undo.callback(handle.remove)
            break
    of_mlp = [method.name for method in methods if method.edits_mlp]
    if not of_mlp and not any(method.edits_hidden for method in methods):
        return
    for layer in decoder.layers:
        hooks = [(layer.block, _leaving)]
        if of_mlp:
            hooks.insert(0, (_mlp_of(layer, of_mlp[0]), _behind_mlp))
        for module, call in hooks:
            hook = ResidualHook(partial(call, layer.index), *around)
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
    actives = _acting(run, layer, "reads_logits")
    if actives:
        forward = _forward(run, hidden.device)
        rows = hidden[:, max(0, forward.position.prompt_rows - 1) :]
        with _without_autocast(hidden.device.type):
            logits = readout(rows)
            for active, state in actives:
                active.method.observe_readout(layer, logits, forward, state)


def _leaving(layer: int, run: Any, entering: Any, output: Any) -> Any:
    """What leaves a block, edited; shown to an extra forward pass."""
    if isinstance(run, Watching):
        if run.watcher.output is not None:
            run.watcher.output(layer, _first(output))
        return None

    def edit(method: Method, hidden: Tensor, forward: ForwardContext, state: State) -> Tensor:
        return method.edit_hidden(layer, hidden, forward, state)

    return _edited(layer, run, _acting(run, layer, "edits_hidden"), output, edit)


def _behind_mlp(layer: int, run: Any, entering: Tensor, output: Any) -> Any:
    """What an MLP gives, edited."""
    if isinstance(run, MissingHandler):
        if not _acting(run.handed, layer, "edits_mlp"):
            return None
        raise PatchError(
            "layers are run again for their gradients, where what a method does behind an MLP "
            "could not be done again: train without gradient checkpointing, or inside "
            "`with patch.disabled():`"
        )

    def edit(method: Method, added: Tensor, forward: ForwardContext, state: State) -> Tensor:
        return method.edit_mlp(layer, added, entering.view(added.shape), forward, state)

    return _edited(layer, run, _acting(run, layer, "edits_mlp"), output, edit)


def _acting(run: Any, layer: int, does: str) -> Acting:
    """The methods that do this here in this forward, each with its state."""
    acting: Sequence[tuple[ActiveMethod, State]] = ()
    if isinstance(run, Editing):
        acting = [(active, active.state) for active in run.actives]
    elif isinstance(run, TracedStep):
        acting = run.acting
    here = [(active, state) for active, state in acting if layer in active.heads]
    return [(active, state) for active, state in here if getattr(active.method, does)]


def _forward(run: Any, device: torch.device) -> ForwardContext:
    """The forward with its masks on the device of a layer."""
    traced = isinstance(run, TracedStep)
    forward: ForwardContext = run.forward(device) if traced else run.forward.on(device)
    return forward


def _edited(layer: int, run: Any, actives: Acting, output: Any, edit: Edit) -> Any:
    """The output of a module after these methods; None if there are none."""
    if not actives:
        return None
    before = _first(output)
    forward = _forward(run, before.device)
    # mixtures of experts may give their rows without the batch
    hidden = before.view(*forward.valid.shape, -1)
    kept = (forward.valid & forward.seen[:, None])[..., None]
    with _without_autocast(hidden.device.type):
        for active, state in actives:
            _check_whole(active, layer)
            new = edit(active.method, hidden, forward, state)
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
