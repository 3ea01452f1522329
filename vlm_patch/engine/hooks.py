"""What happens around one forward of the decoder: methods look, first passes run, then the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache, StaticCache

from vlm_patch.engine.attention import (
    HANDLER_ARGUMENT,
    Call,
    ForwardHandler,
    Graph,
    ThreadState,
    outside,
)
from vlm_patch.engine.compiled import TracedStep, static_step, traceable
from vlm_patch.engine.extra_passes import OLD_CACHE_NAME, ExtraPasses, cache_name, shows_weights
from vlm_patch.engine.logits import LogitsEditor
from vlm_patch.engine.packed import Packed
from vlm_patch.engine.packing import Packing
from vlm_patch.engine.plans import ActiveMethod
from vlm_patch.engine.rows import Editing, Watching
from vlm_patch.engine.state import GenerationState, attach
from vlm_patch.engine.tracker import PromptTracker, carries_images
from vlm_patch.errors import PatchError
from vlm_patch.method import ForwardContext, Method


class Hook:
    """A hook that does nothing in a deep copy or a pickle of the model.

    traced: tries to do the same inside torch.compile, and tells whether it did.
    """

    def __init__(
        self, call: Callable[..., Any] | None, traced: Callable[..., bool] | None = None
    ) -> None:
        self.call, self.traced = call, traced

    def __call__(self, module: nn.Module, args: Any, more: Any) -> Any:
        if self.traced is not None and self.traced(module, args, more):
            return None
        return untraced(self, module, args, more)

    def run(self, module: nn.Module, args: Any, more: Any) -> Any:
        """The hook in the forward that this thread runs."""
        return None if self.call is None else self.call(module, args, more)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (None,)


class QuietHook(Hook):
    """A hook that costs next to nothing while this thread runs nothing."""

    def __init__(
        self, call: Callable[..., Any] | None, traced: Callable[..., bool] | None, now: ThreadState
    ) -> None:
        super().__init__(call, traced)
        self.now = now

    def run(self, module: nn.Module, args: Any, more: Any) -> Any:
        now = self.now
        if (
            now.run is None
            and now.first is None
            and now.settle is None
            and not (type(more) is dict and HANDLER_ARGUMENT in more)
        ):
            return None
        return super().run(module, args, more)


untraced = outside(lambda hook, *given: hook.run(*given))


class MissingHandler(ForwardHandler):
    """Takes the place of what attention serves in a layer that is run again for its gradients, and
    so must be given it by hand (`HANDLER_ARGUMENT`).

    handed: what attention serves there.
    """

    def __init__(self, handed: Any) -> None:
        self.handed = handed

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
    where the decoder counts its positions by it and takes none. softmax_only: see `Packing`.
    logits: edits them, if a method does. on_logits: the names of these methods.
    """

    decoder: nn.Module
    layout: PromptTracker
    switched: Callable[[], list[tuple[Method, dict[int, Tensor | None]]]]
    learned: Callable[[Method, Method], None]
    padding: int | None = None
    softmax_only: bool = True
    now: ThreadState = field(default_factory=ThreadState)
    graph: Graph = field(default_factory=Graph)
    logits: LogitsEditor | None = None
    on_logits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.cache_name = cache_name(self.decoder)
        packing = Packing(
            self.decoder,
            self.cache_name,
            self.softmax_only,
            self.padding is not None,
            self.layout.shard,
            lambda: any(method.in_stream for method, _ in self.switched()),
        )
        self.extra = ExtraPasses(self.decoder, self.learned, self.padding, self.now, packing)

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
        self.now.run = self.now.first = self.now.joint = self.now.settle = self.graph.run = None
        if self.layout.tower is not None:
            self.layout.tower.run = None
        switched = self.switched()
        if not switched:
            self.layout.pending = None
            _forget(self._cache(kwargs))
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
        actives: list[ActiveMethod] = []
        if generation.pictured:
            actives, kwargs = self._start(forward, generation, switched, kwargs)
            kwargs = kwargs if self.logits is None else self.logits.join(kwargs)
        else:
            generation.stock = generation.length
        static = static_step(cache, generation, self.graph, self.layout.shard)
        if static is not None:
            prompt, step = forward.position.prompt_rows > 0, self.layout.next_step
            self.now.settle = lambda: static.settle(generation, actives, prompt, step)
        return (), kwargs

    def after_decoder(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the decoder, called after errors too."""
        if self.now.inside:
            return None
        run, first, settle = self.now.run, self.now.first, self.now.settle
        self.now.run = self.now.first = self.now.settle = None
        if settle is not None and output is not None:
            settle()
        if isinstance(run, Packed):
            output = run.finish(output)
        elif first is not None and output is not None:
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
            if isinstance(run, Packed):
                hidden, run = hidden[:, : run.rows], run.prompt
            if isinstance(run, Watching) and run.watcher.block is not None:
                run.watcher.block(layer, hidden)
            elif isinstance(run, Editing):
                run.enter_block(layer, hidden)

        return show

    def _start(
        self,
        forward: ForwardContext,
        generation: GenerationState,
        switched: list[tuple[Method, dict[int, Tensor | None]]],
        kwargs: dict[str, Any],
    ) -> tuple[list[ActiveMethod], dict[str, Any]]:
        """Lets methods look, runs first passes; returns the methods, and the decoder inputs that
        remain to run.
        """
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
        prompts = []
        if forward.position.starts:
            found = [self.extra.probe(active, forward) for active in actives]
            prompts = [extra for extra in found if extra is not None]
        at_end = any(active.method.edits_prompt_end for active in actives)
        if at_end and forward.position.starts and forward.position.resumed:
            forward = self.extra.read_again(forward, generation, actives, kwargs)
        if at_end and forward.position.prompt_rows:
            self.extra.keep_tail(forward, generation, kwargs)
        shows = shows_weights(self.decoder, kwargs)
        late = [active for active in actives if _late(active, forward)]
        packed = self.extra.read_extra(prompts, forward, kwargs, bool(late))
        if late:
            forward, kwargs = self.extra.read_first(forward, actives, late, kwargs)
        for active in actives:
            active.method.before_forward(forward, active.state)
        if packed is None and not any(active.method.acts_in_layers for active in actives):
            generation.step = None
            return actives, kwargs
        run: Editing | None = generation.step
        if run is not None and run.serves(actives, forward):
            run.go_on(forward)
            run.shows = shows
        else:
            run = Editing(forward, actives, shows)
        generation.step = None if forward.position.prompt_rows else run
        self.now.run = run
        if packed is not None:
            packed.prompt, self.now.run, kwargs = run, packed, packed.inputs
            packed.start()
        if self.decoder.training and _runs_layers_again(self.decoder):
            kwargs[HANDLER_ARGUMENT], self.now.run = run, MissingHandler(run)
        return actives, kwargs

    # ---- the same inside torch.compile

    def trace_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
        """`before_model`, where it has nothing to note."""
        if not torch.compiler.is_dynamo_compiling():
            return False
        if all(self.graph.off.values()):
            return True
        if not self._logits_are_stock():
            return False
        hidden = args[0] if args else _hidden(kwargs)
        return traceable(self.graph, self._cache(kwargs), hidden) is not None

    def trace_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
        """`before_decoder` of a step, or of anything while all methods are off."""
        if not torch.compiler.is_dynamo_compiling():
            return False
        cache = self._cache(kwargs)
        if all(self.graph.off.values()):
            _forget(cache)
            self.graph.run = TracedStep()
            return True
        if args or self.decoder.training or shows_weights(self.decoder, kwargs):
            return False
        if not self._logits_are_stock():
            return False
        static = traceable(self.graph, cache, _hidden(kwargs))
        if static is None:
            return False
        self.graph.run = static.trace(self.graph.off)
        return True

    def trace_block(self, layer: int) -> Callable[..., bool]:
        """`before_block` of a layer."""

        def show(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> bool:
            run: Any = self.graph.run
            if run is None:
                return False
            run.observe_hidden(layer, args[0] if args else kwargs["hidden_states"])
            return True

        return show

    def trace_end(self, module: nn.Module, args: Any, output: Any) -> bool:
        """`after_decoder`."""
        run: Any = self.graph.run
        if run is None:
            return False
        run.finish()
        self.graph.run = None
        return True

    def trace_logits(self, module: nn.Module, args: Any, more: Any) -> bool:
        """What a `LogitsEditor` does, which is nothing while no method edits logits."""
        return torch.compiler.is_dynamo_compiling() and self._logits_are_stock()

    def _logits_are_stock(self) -> bool:
        return all(self.graph.off[name] for name in self.on_logits)

    def _cache(self, kwargs: Mapping[str, Any]) -> Any:
        cache = kwargs.get(self.cache_name)
        return kwargs.get(OLD_CACHE_NAME) if cache is None else cache


def _hidden(kwargs: Mapping[str, Any]) -> Any:
    """What stands for the new tokens, `[B, S, ...]`."""
    embeds = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeds is None else embeds


def _forget(cache: Any) -> None:
    """Notes that a static cache takes tokens that no method sees; others are asked their length."""
    static = type(cache) is StaticCache
    if static and getattr(cache, "vlm_patch", None) is not None:
        cache.vlm_patch = None


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
    """Whether a method edits, in this end of a prompt, a layer not above all that it watches."""
    ends = forward.position.ends and forward.position.prompt_rows
    watched = active.method.watched_rows(forward) if ends else None
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
