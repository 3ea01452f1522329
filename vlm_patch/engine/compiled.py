"""A generated token on a static cache as torch.compile traces it: a pure function of tensors.

What the step reads and writes lies in tensors whose addresses stay the same for as long as the
cache lives. An ordinary forward fills them (`StaticStep.settle`), a traced one goes on from there
(`StaticStep.trace`), and the next ordinary one takes over what Python did not see (`catch_up`).
The hooks of a method are traced as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from vlm_patch.engine.attention import Call, ForwardHandler, Graph
from vlm_patch.engine.plans import ActiveMethod
from vlm_patch.engine.state import KEY_MASKS, GenerationState
from vlm_patch.errors import PatchError
from vlm_patch.method import ForwardContext, Phase, Position, State
from vlm_patch.models.tensor_parallel import Shard
from vlm_patch.primitives.buffers import StaticLength


@dataclass
class StaticMethod(ActiveMethod):
    """A method in the steps on a static cache.

    given: its heads by layer as the patch says them; `heads` holds them at fixed addresses.
    edited: `[B, 1]` (bool), the samples whose row it edits; None for none.
    everywhere: these are all samples.
    watched: the layers whose row it is shown.
    fields: the names of what its state holds.
    missed: it must see every token, and did not.
    """

    given: Any = None
    edited: Tensor | None = None
    everywhere: bool = False
    watched: tuple[int, ...] = ()
    fields: tuple[str, ...] = ()
    missed: bool = False

    @property
    def follows(self) -> bool:
        """Whether it must see every token."""
        return self.method.reads_blocks or bool(self.method.tower_reads())


@dataclass
class StaticStep:
    """The steps on one static cache.

    graph: of the patch that made it.
    length: how many tokens it holds. prompt_end: see `Position`, `[1]`.
    masks: image, query and content `[B, capacity]`, seen `[B]`; see `ForwardContext`.
    ready: an ordinary forward has filled everything.
    ran: traced steps came behind it, which Python did not count.
    pictured: some sample has an image; without one everything is left stock.
    buffers: the tensors at fixed addresses, by what they hold.
    """

    graph: Graph
    length: StaticLength
    prompt_end: Tensor
    shard: Shard
    methods: list[StaticMethod] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    ready: bool = False
    ran: bool = False
    pictured: bool = True
    buffers: dict[Any, Tensor] = field(default_factory=dict)

    def serves(self, actives: Sequence[ActiveMethod]) -> bool:
        """Whether the same methods act in the same layers and heads."""
        return len(actives) == len(self.methods) and all(
            old.method is new.method and old.given is new.heads and old.state is new.state
            for old, new in zip(self.methods, actives, strict=True)
        )

    @torch.no_grad()
    def settle(
        self,
        generation: GenerationState,
        actives: list[ActiveMethod],
        prompt: bool,
        step: Callable[[GenerationState], ForwardContext],
    ) -> None:
        """Takes over what an ordinary forward left, of a prompt or of generated tokens.

        step: makes the forward of the next generated token. Which rows are edited in it is asked
        once per prompt, since it makes the host wait.
        """
        self.ran, self.ready = False, generation.length < self.length.capacity
        self.pictured = generation.pictured
        with torch.inference_mode(False):
            self.length.tensor.fill_(generation.length)
            if prompt:
                self.prompt_end.fill_(generation.end)
            for name in KEY_MASKS:
                mask = self._kept(name, getattr(generation.keys, name), True)
                setattr(generation.keys, name, mask)
                self.masks[name] = mask
            seen = self._kept("seen", generation.keys.seen, False)
            self.masks["seen"] = generation.keys.seen = seen
            for active in actives:
                self._keep_state(active.method.name, active.state)
            if self.ready and (prompt or not self.serves(actives)):
                forward = step(generation)
                self.methods = [self._method(active, forward) for active in actives]

    @torch.no_grad()
    def select(self, generation: GenerationState, index: Tensor) -> None:
        """Follows a generation whose samples `[B]` were reordered."""
        with torch.inference_mode(False):
            for name in (*KEY_MASKS, "seen"):
                value = self._kept(name, getattr(generation.keys, name), name != "seen")
                setattr(generation.keys, name, value)
            for known in self.methods:
                self._keep_state(known.method.name, known.state)
                if known.edited is not None:
                    known.edited.copy_(known.edited[index.to(known.edited.device)])

    def catch_up(self, generation: GenerationState) -> None:
        """Tells Python of the steps that were traced; the host waits for the device here."""
        self.ran = False
        generation.length = int(self.length.tensor)
        if not generation.pictured:
            generation.stock = generation.length
        for known in self.methods:
            name = known.method.name
            if known.follows and not known.missed and name in generation.history:
                generation.history[name] = (generation.history[name][0], generation.length)

    def knows(self, off: Mapping[str, bool]) -> bool:
        """Whether every method that is on has seen all tokens; off: by name, what is off."""
        if not self.pictured:
            return True
        missed = {known.method.name: known.missed for known in self.methods}
        return all(gone or missed.get(name) is False for name, gone in off.items())

    def trace(self, off: Mapping[str, bool]) -> TracedStep:
        """A step inside torch.compile."""
        seen = self.masks["seen"]
        row = torch.ones_like(seen)[:, None]
        forward = ForwardContext(
            position=Position(self.length, Phase.DECODE, prompt_end=self.prompt_end),
            image=self.masks["image"],
            query=self.masks["query"],
            content=self.masks["content"],
            valid=row,
            text=seen[:, None],
            last=row,
            seen=seen,
            reading=False,
            inputs={},
            shard=self.shard,
        )
        acting = []
        for known in self.methods:
            if not off[known.method.name]:
                state = _copy(known.state, known.fields)
                known.method.before_forward(forward, state)
                acting.append((known, state))
            elif known.follows:
                known.missed = True
        return TracedStep(self, forward, acting)

    def _method(self, active: ActiveMethod, forward: ForwardContext) -> StaticMethod:
        name, device = active.method.name, forward.seen.device
        heads = {
            layer: None if on is None else self._kept((name, "heads", layer), on.to(device), False)
            for layer, on in active.heads.items()
        }
        edited = active.method.edited_rows(forward)
        if edited is not None:
            edited = self._kept((name, "rows"), edited, False) if edited.any() else None
        watched = active.method.watched_rows(forward)
        return StaticMethod(
            active.method,
            active.state,
            heads,
            given=active.heads,
            edited=edited,
            everywhere=edited is not None and bool(edited.all()),
            watched=tuple(watched[0]) if watched is not None and watched[1].any() else (),
            fields=tuple(_kept_fields(active.state)),
        )

    def _keep_state(self, name: str, state: State) -> None:
        for part in _kept_fields(state):
            value, wide = getattr(state, part), part in state.per_key
            if isinstance(value, Tensor):
                setattr(state, part, self._kept((name, part), value, wide))
            elif isinstance(value, dict):
                for layer, of_layer in value.items():
                    value[layer] = self._kept((name, part, layer), of_layer, wide)

    def _kept(self, key: Any, value: Tensor, wide: bool) -> Tensor:
        """The tensor at a fixed address that now holds `value`; wide: its last dimension is the
        keys, for all of which there is room.
        """
        buffer = self.buffers.get(key)
        if buffer is value:
            return value
        capacity = self.length.capacity
        shape = (*value.shape[:-1], capacity) if wide else value.shape
        kind = value.dtype, value.device
        if buffer is None or buffer.shape != shape or (buffer.dtype, buffer.device) != kind:
            buffer = self.buffers[key] = torch.zeros(shape, dtype=value.dtype, device=value.device)
            torch._dynamo.mark_static_address(buffer)
        if wide:
            known = min(capacity, value.shape[-1])
            buffer[..., known:] = 0
            buffer[..., :known] = value[..., :known]
        else:
            buffer.copy_(value)
        return buffer


class TracedStep(ForwardHandler):
    """One step inside torch.compile, or the stock model's if no method acts.

    acting: the methods, each with the state that its hooks may change.
    """

    def __init__(
        self,
        static: StaticStep | None = None,
        forward: ForwardContext | None = None,
        acting: Sequence[tuple[StaticMethod, State]] = (),
    ) -> None:
        self.static, self.acting = static, acting
        self._forward = forward

    def forward(self, device: torch.device) -> ForwardContext:
        """The forward with its masks on the device of a layer."""
        assert self._forward is not None, "methods act in a forward"
        return self._forward.on(device)

    def observe_hidden(self, layer: int, hidden: Tensor) -> None:
        """Shows the residual stream entering a block."""
        for known, state in self.acting:
            if known.method.reads_blocks and layer in known.heads:
                known.method.observe_hidden(layer, hidden, self.forward(hidden.device), state)

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The head outputs of the row."""
        output = self._row(call)
        for known, state in self.acting:
            if call.layer in known.heads:
                forward = self.forward(output.device)
                gain = known.method.edit_heads(call.layer, output, forward, state)
                heads = known.heads[call.layer]
                if gain is not None and heads is not None:
                    gain = torch.where(heads.to(gain.device), gain, 1.0)
                if gain is not None:
                    output = output * gain.to(output.dtype)[:, None, :, None]
        return output, None

    def finish(self) -> None:
        """Writes what the methods remember to the tensors at fixed addresses."""
        if self.static is None:
            return
        for known, state in self.acting:
            for name in known.fields:
                _store(known, name, getattr(known.state, name), getattr(state, name))
        self.static.length.tensor.add_(1)
        self.static.ran = True

    def _row(self, call: Call) -> Tensor:
        """Its output `[B, 1, H, Dv]` behind all edits of scores and weights."""
        layer, device = call.layer, call.query.device
        shown = [known for known, _ in self.acting if layer in known.watched]
        edits = [k for k, _ in self.acting if layer in k.heads and k.edited is not None]
        if not shown and not edits:
            return call.stock()[0]
        forward, rows = self.forward(device), torch.zeros(1, dtype=torch.long, device=device)
        forward.rows = rows
        scores, unseen = row_scores(call, forward.position.past)
        for known, state in self.acting:
            if known in edits and known.method.edits_scores:
                new = known.method.edit_scores(layer, scores, forward, state)
                scores = torch.where(unseen, scores, _merged(known, layer, new, scores))
        weights = scores.softmax(-1)
        for known, state in self.acting:
            if known in shown:
                known.method.observe(layer, weights, rows, forward, state)
            if known in edits and known.method.edits_weights:
                new = known.method.edit_weights(layer, weights, forward, state)
                weights = _merged(known, layer, new, weights)
        return row_output(call, weights) if edits else call.stock()[0]


def row_scores(call: Call, past: StaticLength) -> tuple[Tensor, Tensor]:
    """`Call.scores` of the one row `[B, H, 1, K]`, and the keys it must not look at; as a product
    and a sum, which the compiler fuses with the casts before and the softmax behind.
    """
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    batch, heads, _, size = call.query.shape
    groups, keys = call.key.shape[1:3]
    query = call.query.reshape(batch, groups, heads // groups, 1, size).to(dtype)
    scores = (query * call.key[:, :, None].to(dtype)).sum(-1) * call.scaling
    scores = scores.view(batch, heads, 1, keys)
    softcap = call.options.get("softcap")
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = call.mask
    if mask is None:
        unseen = torch.arange(keys, device=scores.device) > past.tensor.to(scores.device)
        return scores.masked_fill(unseen, torch.finfo(dtype).min), unseen
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(dtype).min), ~mask
    return scores + mask.to(dtype), mask <= torch.finfo(mask.dtype).min / 2


def row_output(call: Call, weights: Tensor) -> Tensor:
    """`Call.output` of the one row: `[B, 1, H, Dv]` of weights `[B, H, 1, K]`."""
    batch, heads, _, keys = weights.shape
    packed = weights.view(batch, call.value.shape[1], -1, keys).to(call.value.dtype)
    output = torch.matmul(packed, call.value).reshape(batch, 1, heads, -1)
    return output.to(call.query.dtype)


def _merged(known: StaticMethod, layer: int, new: Tensor, before: Tensor) -> Tensor:
    """What a method made of scores or weights, in the samples and heads where it acts."""
    heads = known.heads[layer]
    if known.edited is not None and not known.everywhere:
        new = torch.where(known.edited.to(new.device)[:, None, :, None], new, before)
    if heads is not None:
        new = torch.where(heads.to(new.device)[:, None, None], new, before)
    return new


def _kept_fields(state: State) -> list[str]:
    """The names of what a state holds from one forward to the next."""
    return [name for name in vars(state) if name not in state.per_forward]


def _copy(state: State, fields: Sequence[str]) -> State:
    """The same tensors in a state that hooks may change."""
    copied = type(state)()
    for name in fields:
        value = getattr(state, name)
        setattr(copied, name, dict(value) if isinstance(value, dict) else value)
    return copied


def _store(known: StaticMethod, name: str, before: Any, after: Any) -> None:
    """Writes what a hook put in the place of a tensor to the address of that tensor."""
    if isinstance(after, dict):
        for layer, value in after.items():
            _store(known, name, before.get(layer), value)
    elif after is not before:
        if before is None or after is None or before.shape != after.shape:
            raise PatchError(
                f"{known.method.name} makes, drops or enlarges {name!r} of its state at a "
                "generated token, which a compiled step cannot: make it at the prompt, and let it "
                "grow by `append` with its name in `per_key` of the state"
            )
        before.copy_(after)


def capacity_of(cache: StaticCache) -> int | None:
    """How many tokens a static cache can hold; None where every layer forgets the oldest."""
    sizes = [
        int(layer.max_cache_len)
        for layer in cache.layers
        if hasattr(layer, "max_cache_len") and not getattr(layer, "is_sliding", False)
    ]
    return min(sizes) if sizes else None


def static_step(
    cache: Any, generation: GenerationState, graph: Graph, shard: Shard
) -> StaticStep | None:
    """What the steps of a generation on this cache share; None where they cannot be traced."""
    capacity = capacity_of(cache) if type(cache) is StaticCache else None
    if capacity is None:
        return None
    known: StaticStep | None = generation.static
    if known is None:
        with torch.inference_mode(False):
            seen = generation.keys.seen
            length, end = (seen.new_zeros(1, dtype=torch.long) for _ in range(2))
        for number in (length, end):
            torch._dynamo.mark_static_address(number)
        static = StaticLength(length, capacity)
        known = generation.static = StaticStep(graph, static, end, shard)
    known.ready = False
    return known


def traceable(graph: Graph, cache: Any, hidden: Any) -> StaticStep | None:
    """What the step that is about to be traced goes on from; None if it must not be traced."""
    generation: GenerationState | None = getattr(cache, "vlm_patch", None)
    if type(cache) is not StaticCache or generation is None or hidden is None:
        return None
    static: StaticStep | None = generation.static
    if static is None or static.graph is not graph or not static.ready or generation.deferred:
        return None
    if hidden.shape[:2] != (static.masks["seen"].shape[0], 1):
        return None
    return static if static.knows(graph.off) else None
