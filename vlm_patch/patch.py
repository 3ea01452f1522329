"""Puts methods on a model, switches them, takes them off."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vlm_patch import heads
from vlm_patch.engine import attention, residual
from vlm_patch.engine.branches import Branches
from vlm_patch.engine.generate_guard import GuardedGenerate, check_options, prompt_inputs
from vlm_patch.engine.hooks import ForwardHooks, Hook, QuietHook
from vlm_patch.engine.logits import LogitsEditor, check_model
from vlm_patch.engine.tower import tower_of
from vlm_patch.engine.tracker import PromptTracker
from vlm_patch.errors import PatchError
from vlm_patch.method import Method
from vlm_patch.methods.registry import instances, resolve, unknown, values
from vlm_patch.models.info import Decoder, inspect_model, place, unwrapped
from vlm_patch.models.tensor_parallel import shard_of
from vlm_patch.prompts.masks import ManualMasks
from vlm_patch.prompts.question import QuestionReader

_owners = itertools.count()


def wrap(
    model: Any,
    *methods: Method | str,
    processor: Any = None,
    layers: heads.LayerSpec | None = None,
    heads: heads.HeadSpec | Mapping[str, heads.HeadSpec] | None = None,
) -> Patch:
    """Puts methods on a vision-language model of transformers; the model stays the user's own.

    model: a pretrained model; also in an adapter of PEFT, in what `torch.compile` returns, and in
        DistributedDataParallel.
    methods: instances, names such as "gift" for the defaults of this model, or import paths of your
        own ("my_package.my_file:MyMethod"); they act in the order given.
    processor: the model's own; needed to tell the user's question from the text around it (GIFT).
    layers: restricts every method to these layers: `[12, 13]` or `"12-20"`.
    heads: the heads that are on, for all methods or as a mapping by method name; each is a bool
        table `[layers, heads]`, `{12: [0, 3]}`, `"12:0,3; 14-20:*"` or `"all"`. None: all heads of
        the layers that a method is made for.

    Returns the handle. Raises UnsupportedModelError, PatchError (already wrapped), ValueError (bad
    names, heads, hyperparameters).

        with wrap(model, VAR(), GIFT(alpha=4.0), processor=processor, layers="8-24"):
            model.generate(**inputs)
    """
    return Patch(model, methods, processor, layers, heads)


def unwrap(model: Any) -> bool:
    """Takes off the patch of a model whose handle was lost.

    Returns whether there was one; harmless where there is none. Raises UnsupportedModelError for
    what cannot be wrapped.

        vlm_patch.unwrap(model)  # at the top of a notebook cell that wraps the model
        patch = vlm_patch.wrap(model, VAR())
    """
    result = {
        id(p): p
        for layer in inspect_model(unwrapped(model)[-1]).layers
        if (p := attention.patch_on(layer))
    }
    for patch in result.values():
        patch.remove()
    return bool(result)


class Patch:
    """The handle of a wrapped model; as a context manager it takes the patch off at its end.

    model: what was given to `wrap`.
    heads: per method name a live bool table `[layers, heads]` of what is on (see `wrap`); what is
        written there counts from the next forward on.

        patch = wrap(model, VHR())
        patch.heads["vhr"][12, 3] = False  # one head
        with patch.disabled():             # the stock model for a moment
            model.generate(**inputs)
        patch.remove()                     # the model exactly as before
    """

    def __init__(
        self,
        model: Any,
        methods: Sequence[Method | str],
        processor: Any = None,
        layers: heads.LayerSpec | None = None,
        head_specs: heads.HeadSpec | Mapping[str, heads.HeadSpec] | None = None,
    ) -> None:
        self._shells = unwrapped(model)
        base = self._shells[-1]
        decoder = inspect_model(base)
        for layer in decoder.layers:
            config: Any = layer.attention.config
            attention.check_kernel(layer.index, config._attn_implementation)
            if attention.patch_on(layer):
                raise PatchError(
                    f"this {type(base).__name__} is already wrapped: call remove() on its patch "
                    "first, or vlm_patch.unwrap(model) if that was lost, or give all methods to "
                    "one wrap(model, VAR(), VHR())"
                )
        self.model, self._base, self._decoder = model, base, decoder
        self._methods = resolve(instances(methods), decoder)
        check_model(self._methods, decoder)
        self.heads = _tables(self._methods, decoder, layers, head_specs)
        self._disabled: list[frozenset[str]] = []
        self._switches: dict[str, tuple[Tensor, int, dict[int, Tensor | None]]] = {}
        ids, special = decoder.image_ids, decoder.special
        reader = (
            None if processor is None else QuestionReader(processor, ids, special.has_chat_template)
        )
        self._processor = processor
        self._logits: LogitsEditor | None = None
        self._shard = shard_of(base, decoder.layers[0].attention)
        reads = {method.name: method.tower_reads() for method in self._methods}
        self._tower = tower_of(base, decoder, reads)
        self._layout = PromptTracker(
            next(_owners), ids, reader, special.mask, self._shard, self._tower
        )
        self._removed = False
        self._graph = attention.Graph()
        self._switched()
        with ExitStack() as undo:
            self._put_on(undo)
            self._undo = undo.pop_all()

    def _put_on(self, undo: ExitStack) -> None:
        decoder = self._decoder.module
        config: Any = decoder.config
        padding = config.pad_token_id if self._decoder.special.positions_from_padding else None
        softmax_only = len(self._decoder.layers) == self._decoder.depth
        passes = self._passes = ForwardHooks(
            decoder,
            self._layout,
            self._switched,
            self._learned,
            padding,
            softmax_only,
            graph=self._graph,
        )
        self._put_on_logits(passes, undo)
        for layer in self._decoder.layers:
            attention.install(layer, passes.now, undo, self, passes.graph)
            if any(method.reads_blocks for method in self._methods):
                calls = passes.before_block(layer.index), passes.trace_block(layer.index)
                show = QuietHook(*calls, passes.now)
                handle = layer.block.register_forward_pre_hook(show, with_kwargs=True)
                undo.callback(handle.remove)
        around = passes.now, passes.graph
        residual.install(self._decoder, self._methods, around, undo, self._shard.ranks > 1)
        if self._tower is not None:
            self._tower.install(undo)
        # an adapter of PEFT calls the forward of its model past its hooks
        hooks = dict.fromkeys(self._shells, (passes.before_model, passes.trace_model))
        hooks[decoder] = passes.before_decoder, passes.trace_decoder
        for module, both in hooks.items():
            handle = module.register_forward_pre_hook(Hook(*both), with_kwargs=True)
            undo.callback(handle.remove)
        calls = passes.after_decoder, passes.trace_end
        after = Hook(*calls) if passes.logits else QuietHook(*calls, passes.now)
        handle = decoder.register_forward_hook(after, always_call=True)
        undo.callback(handle.remove)
        generator = self._decoder.generator
        before = {name: call for name, call in generator.__dict__.items() if name == "generate"}
        generator.__dict__["generate"] = GuardedGenerate(
            generator, generator.generate, self._generating
        )
        undo.callback(generator.__dict__.update, before)
        undo.callback(generator.__dict__.pop, "generate", None)

    def _put_on_logits(self, passes: ForwardHooks, undo: ExitStack) -> None:
        """The hooks of methods that edit logits; without one there are none."""
        passes.on_logits = tuple(method.name for method in self._methods if method.edits_logits)
        if not passes.on_logits:
            return
        tokenizer = getattr(self._processor, "tokenizer", None)
        encode = tokenizer and (lambda text: tokenizer.encode(text, add_special_tokens=False))
        branches = Branches(passes.extra, encode, self._base.get_input_embeddings())
        editor = passes.logits = self._logits = LogitsEditor(self._decoder, passes.extra, branches)
        generator = self._decoder.generator
        inner = [] if generator is self._base else [generator]
        for module in (*self._shells, *inner):
            handle = module.register_forward_hook(Hook(editor.after_model, passes.trace_logits))
            undo.callback(handle.remove)
        for module in inner:
            hook = Hook(passes.before_generator, passes.trace_logits)
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        early = {layer for method in self._methods for layer in method.early_layers()}
        for layer in self._decoder.layers:
            if layer.index in early:
                hook = Hook(editor.enter(layer.index), passes.trace_logits)
                handle = layer.block.register_forward_pre_hook(hook, with_kwargs=True)
                undo.callback(handle.remove)

    def remove(self) -> None:
        """Takes the patch off; the model is exactly as before. Harmless when called again."""
        self._undo.close()
        self._removed = True

    def __enter__(self) -> Patch:
        if self._removed:
            raise PatchError("this patch was taken off: put the methods on again with wrap")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @contextmanager
    def disabled(self, *names: str) -> Iterator[None]:
        """The stock model for a moment, or without some methods: `with patch.disabled("vhr"):`."""
        for name in names:
            if name not in self.heads:
                raise ValueError(unknown(name, list(self.heads)))
        self._disabled.append(frozenset(names or self.heads))
        self._switched()
        try:
            yield
        finally:
            self._disabled.pop()
            self._switched()

    @contextmanager
    def _generating(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Around the model's `generate`: refuses what cannot be right, and keeps its prompt."""
        if not self._switched():
            yield
            return
        generator = self._decoder.generator
        check_options(arguments, generator.generation_config)
        inner, mask_name = generator is not self._base, self._decoder.special.mask
        prompt = prompt_inputs(arguments, generator.generation_config, inner, mask_name)
        reading = any(method.tower_reads() for method, _ in self._switched())
        listening = self._tower.generating(arguments) if self._tower and reading else nullcontext()
        asking = self._logits.generating(arguments) if self._logits else nullcontext()
        with self._layout.generating(prompt), listening, asking:
            yield

    @contextmanager
    def prompt(self, image: Tensor | None = None, query: Tensor | None = None) -> Iterator[None]:
        """Token masks by hand for this thread's prompts run inside: what is image, what question.

        image, query: bool `[batch, prompt length]` over the padded prompt; repeated for beams and
        return sequences. None: derived as usual. Raises PatchError, when the prompt runs, if a mask
        does not fit it.
        """
        before, self._layout.given = self._layout.given, ManualMasks(image, query)
        try:
            yield
        finally:
            self._layout.given = before

    def describe(self) -> str:
        """What is patched, in words: decoder, device, layers, methods with their values, what is
        off."""
        decoder = self._decoder
        layers = heads.text([layer.index for layer in decoder.layers])
        kind = type(decoder.module).__name__
        lines = [
            f"{type(self._base).__name__} ({place(decoder.module)}): {kind}, "
            f"{decoder.depth} layers x {decoder.heads} heads, softmax attention in {layers}"
        ]
        if self._removed:
            lines[0] += " (removed: the model is stock)"
        for method in self._methods:
            reports = [method.report()]
            own = type(method).extra_prompt is not Method.extra_prompt
            if own and self.heads[method.name].any():
                reports.append(self._passes.extra.report())
            said = "".join(f"; {report}" for report in reports if report)
            lines.append(f"  {values(method)}: {self._where(method)}{said}")
        return "\n".join(lines)

    __repr__ = describe

    def _where(self, method: Method) -> str:
        table = self.heads[method.name]
        if not method.acts_in_layers:
            where = "on the logits" if table.any() else "off"
            return where + ", disabled at the moment" * (method.name in self._off())
        on = [layer for layer, row in enumerate(table) if row.any()]
        partly = [layer for layer in on if not table[layer].all()]
        where = f"on in layers {heads.text(on)}" if on else "off"
        if partly:
            where += f", with some heads off in {heads.text(partly)}"
        if method.name in self._off():
            where += ", disabled at the moment"
        return where

    def _off(self) -> frozenset[str]:
        return frozenset().union(*self._disabled)

    def _switched(self) -> list[tuple[Method, dict[int, Tensor | None]]]:
        """The methods that are on, and by layer their heads (None: all); `Graph.off` is told."""
        off = self._off()
        layers = [(m, self._layers(m.name)) for m in self._methods if m.name not in off]
        on = [(method, by_layer) for method, by_layer in layers if by_layer]
        names = {method.name for method, _ in on}
        self._graph.off.update({method.name: method.name not in names for method in self._methods})
        return on

    def _layers(self, name: str) -> dict[int, Tensor | None]:
        """What the live table of a method says; worked out again only after it was written."""
        table = self.heads[name]
        known = self._switches.get(name)
        if known is None or known[0] is not table or known[1] != table._version:
            on = {
                layer.index: None if row.all() else self._shard.mine(row, 0)
                for layer in self._decoder.layers
                if (row := table[layer.index]).any()
            }
            known = self._switches[name] = (table, table._version, on)
        return known[2]

    def _learned(self, before: Method, after: Method) -> None:
        self._methods = [after if method is before else method for method in self._methods]


def _check_no_heads(method: Method, specs: Any) -> None:
    """Raises ValueError where heads were named for a method that has none."""
    if isinstance(specs, Mapping) and method.name in specs:
        raise ValueError(
            f"heads: found {method.name!r}, which edits logits and has no heads: leave it out, and "
            f'switch it by `with patch.disabled("{method.name}"):`'
        )


def _tables(
    methods: list[Method],
    decoder: Decoder,
    layers: heads.LayerSpec | None,
    specs: heads.HeadSpec | Mapping[str, heads.HeadSpec] | None,
) -> heads.HeadTables:
    names = [method.name for method in methods]
    tables = heads.HeadTables(names, decoder.depth, decoder.heads)
    chosen = heads.by_method(specs, names)
    allowed = torch.zeros(decoder.depth, 1, dtype=torch.bool)
    allowed[heads.numbers("*" if layers is None else layers, decoder.depth, "layer")] = True
    softmax = torch.zeros_like(allowed)
    softmax[list(decoder.softmax)] = True
    for method in methods:
        own = [layer for layer in method.default_layers(decoder.depth) if softmax[layer]]
        spec = chosen[method.name]
        tables[method.name] = method.default_heads(own) if spec is None else spec
        if not method.acts_in_layers:
            _check_no_heads(method, specs)
            tables[method.name] = "all"
            continue
        lost = (tables[method.name] & ~softmax).any(1).nonzero().flatten().tolist()
        if lost:
            warnings.warn(
                f"{method.name} is off in layers {heads.text(lost)}, which have no softmax "
                f"attention on this model; layers {heads.text(list(decoder.softmax))} have it",
                stacklevel=4,
            )
        tables[method.name] &= allowed & softmax
        if not tables[method.name].any():
            warnings.warn(
                f"{method.name} is off in every layer: its layers {heads.text(own)} and the layers "
                "and heads given have none in common",
                stacklevel=4,
            )
    return tables
