"""What happens around one forward of the decoder: methods look, first passes run, then the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache, StaticCache

from vlm_patch.engine.attention import HANDLER_ARGUMENT, Call, ThreadState
from vlm_patch.engine.extra_passes import OLD_CACHE_NAME, ExtraPasses, shows_weights
from vlm_patch.engine.logits import LogitsEditor
from vlm_patch.engine.rows import ActiveMethod, Editing, Watching
from vlm_patch.engine.state import GenerationState, attach
from vlm_patch.engine.tracker import PromptTracker, carries_images
from vlm_patch.errors import PatchError
from vlm_patch.method import ForwardContext, Method


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

    def __init__(self, call: Callable[..., Any] | None, now: ThreadState) -> None:
        super().__init__(call)
        self.now = now

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, more: Any) -> Any:
        now = self.now
        if (
            now.run is None
            and now.first is None
            and not (type(more) is dict and HANDLER_ARGUMENT in more)
        ):
            return None
        return super().__call__(module, args, more)


class MissingHandler:
    """Takes the place of what attention serves in a layer that is run again for its gradients, and
    so must be given it by hand (`HANDLER_ARGUMENT`).
    """

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        raise PatchError(
            f"layer {call.layer} was not handed what this patch does in it, which is needed where "
            "layers run twice: train without gradient checkpointing, or inside "
            "`with patch.disabled():`"
        )


@dataclass
class ForwardHooks:
    """The hooks of a patched model.

    switched: the methods that are on, each with its layers and their heads; asked at every forward.
    learned: told of a method that found out something about the model. padding: the padding token,
    where the decoder counts its positions by it and takes none. logits: edits them, if a method
    does.
    """

    decoder: nn.Module
    layout: PromptTracker
    switched: Callable[[], list[tuple[Method, dict[int, Tensor | None]]]]
    learned: Callable[[Method, Method], None]
    padding: int | None = None
    now: ThreadState = field(default_factory=ThreadState)
    logits: LogitsEditor | None = None

    def __post_init__(self) -> None:
        self.extra = ExtraPasses(self.decoder, self.learned, self.padding, self.now)
        self.cache_name = self.extra.cache_name

    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        if self.now.inside:
            return
        inputs = self.layout.pending = _named(module, args, kwargs) if args else kwargs
        if self.logits is not None:
            self.logits.before_model(module, inputs)
        tower = self.layout.tower
        if tower is not None and carries_images(inputs) and _readers(self.switched()):
            tower.listen(inputs)

    def before_generator(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a language model inside the whole, which generates by itself."""
        if self.logits is not None and not self.now.inside:
            self.logits.before_model(module, _named(module, args, kwargs))

    def before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the decoder."""
        if self.now.inside:
            return None
        self.now.run = self.now.first = self.now.joint = None
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
        reader = _readers(switched) if self.layout.tower is not None else []
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
        if cache is not None and forward.position.past == 0:
            attach(cache, generation)
        if generation.pictured:
            kwargs = self._start(forward, generation, switched, kwargs)
            kwargs = kwargs if self.logits is None else self.logits.join(kwargs)
        else:
            generation.stock = generation.length
        return (), kwargs

    def after_decoder(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the decoder, called after errors too."""
        if self.now.inside:
            return None
        first, self.now.run, self.now.first = self.now.first, None, None
        if first is not None and output is not None:
            self._complete(first, output)
        if self.logits is not None:
            self.logits.after_decoder(output)
        return output

    def _complete(self, first: Any, output: Any) -> None:
        """Puts the rows of a first pass in front of the output of the last rows."""
        for name, dim in (("last_hidden_state", 1), ("hidden_states", 1), ("attentions", 2)):
            if output.get(name) is not None:
                output[name] = _join(first[name], output[name], dim)

    def before_block(self, layer: int) -> Callable[..., None]:
        """A forward pre-hook for the block of a layer."""

        def show(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            run = kwargs.get(HANDLER_ARGUMENT, self.now.run)
            if run is None:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            if isinstance(run, Watching) and run.watcher.block is not None:
                run.watcher.block(layer, hidden)
            elif isinstance(run, Editing):
                forward = run.forward.on(hidden.device)
                for active in run.actives:
                    if active.method.reads_blocks and layer in active.heads:
                        active.method.observe_hidden(layer, hidden, forward, active.state)

        return show

    def _start(
        self,
        forward: ForwardContext,
        generation: GenerationState,
        switched: list[tuple[Method, dict[int, Tensor | None]]],
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Lets methods look, runs first passes; returns the decoder inputs that remain to run."""
        actives = []
        for method, layers in switched:
            state = generation.states.get(method.name)
            if state is None:
                state = generation.states[method.name] = method.state()
            actives.append(ActiveMethod(method, state, layers))
            if method.reads_blocks:
                generation.follow(method.name, layers, forward.position.past)
            elif method.tower_reads():
                generation.follow(method.name, (), forward.position.past)
        if self.logits is not None:
            self.logits.start(forward, generation, actives, kwargs)
        if forward.position.starts:
            for active in actives:
                self.extra.probe(active, forward)
        at_end = any(active.method.edits_prompt_end for active in actives)
        if at_end and forward.position.starts and forward.position.resumed:
            forward = self.extra.read_again(forward, generation, actives, kwargs)
        if at_end and forward.position.prompt_rows:
            self.extra.keep_tail(forward, generation, kwargs)
        shows = shows_weights(self.decoder, kwargs)
        late = [active for active in actives if _late(active, forward)]
        if late:
            forward, kwargs = self.extra.read_first(forward, actives, late, kwargs)
        for active in actives:
            active.method.before_forward(forward, active.state)
        if not any(active.method.acts_in_layers for active in actives):
            generation.step = None
            return kwargs
        run: Editing | None = generation.step
        if run is not None and run.serves(actives, forward):
            run.go_on(forward)
            run.shows = shows
        else:
            run = Editing(forward, actives, shows)
        generation.step = None if forward.position.prompt_rows else run
        self.now.run = run
        if self.decoder.training and _runs_layers_again(self.decoder):
            kwargs[HANDLER_ARGUMENT], self.now.run = run, MissingHandler()
        return kwargs


def _readers(switched: list[tuple[Method, dict[int, Tensor | None]]]) -> list[str]:
    """The names of the methods that read the vision tower."""
    return [method.name for method, _ in switched if method.tower_reads()]


def _wants_cache(decoder: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the decoder is about to make a cache of its own, which could not be followed."""
    wanted = kwargs.get("use_cache")
    if wanted is None:
        config: Any = decoder.config
        wanted = not decoder.training and getattr(config, "use_cache", False)
    return bool(wanted)


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


def _late(active: ActiveMethod, forward: ForwardContext) -> bool:
    """Whether a method edits, in this forward, a layer that is not above all that it watches."""
    watched = active.method.watched_rows(forward) if forward.position.ends else None
    if watched is None or not active.heads or max(watched[0]) < min(active.heads):
        return False
    edited = active.method.edited_rows(forward)
    return edited is not None and bool(edited.any())


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
