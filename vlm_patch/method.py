"""The contract of a method: what it may declare, and what it is shown.

A method of your own is a frozen dataclass that inherits from `Method`; see docs/add-a-method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_patch.heads import HeadSpec
from vlm_patch.models.tensor_parallel import WHOLE, Shard
from vlm_patch.primitives.buffers import StaticLength
from vlm_patch.validation import check_wholes


class State:
    """What a method remembers of one generation. Subclasses are dataclasses whose fields are
    tensors with the batch first, dicts of such tensors by layer, or None; all have a default.

    The engine makes one per generation, lets it travel with the cache, and reorders its samples
    as beams are. per_key: names of the fields whose last dimension is the keys so far, or more of
    them; a compiled step finds room there for all keys of its static cache. per_forward: names of
    the fields that every forward makes anew; a compiled step keeps nothing of them.

        @dataclass
        class Seen(State):
            mass: dict[int, Tensor] = field(default_factory=dict)  # by layer, [B, H]
    """

    per_key: ClassVar[tuple[str, ...]] = ()
    per_forward: ClassVar[tuple[str, ...]] = ()

    def select(self, index: Tensor) -> None:
        """Keeps the samples `index` `[B]`, which may be reordered or repeated."""
        for name, value in vars(self).items():
            setattr(self, name, _selected(value, index))

    def clear(self) -> None:
        """Sets every field to its default."""
        vars(self).update(vars(type(self)()))


def _selected(value: Any, index: Tensor) -> Any:
    if isinstance(value, dict):
        return {layer: _selected(of_layer, index) for layer, of_layer in value.items()}
    return None if value is None else value.index_select(0, index.to(value.device))


@dataclass(frozen=True)
class ModelInfo:
    """What a method may know of the model when it fills in its defaults (`Method.resolve`).

    depth: number of decoder layers.
    width: size of the residual stream.
    heads: query heads of a layer.
    profile: the published defaults of this method for this model, empty where none are known.
    softmax: the layers with softmax attention, the only ones to act in; None for all.
    """

    depth: int
    width: int
    heads: int
    profile: Mapping[str, Any]
    softmax: Sequence[int] | None = None

    def acting(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Those of `layers` (a default) with softmax attention, or else the nearest one to them."""
        own = range(self.depth) if self.softmax is None else self.softmax
        found = tuple(layer for layer in own if layer in layers)
        return found or (min(own, key=lambda layer: abs(2 * layer - layers[0] - layers[-1])),)

    def layers_from(self, first: int) -> tuple[int, ...]:
        """All layers but those below `first`; the last one where there are no others."""
        return self.acting(range(min(first, self.depth - 1), self.depth))

    def published_layers(
        self, name: str, first: int, last: int
    ) -> tuple[tuple[int, ...], list[str]]:
        """The layers of the profile, else `first` to `last` of 32 scaled to the depth, and what
        that comes to in words.
        """
        if "layers" in self.profile:
            return tuple(self.profile["layers"]), []
        start, stop = (round(layer * self.depth / 32) for layer in (first, last + 1))
        layers = self.acting(range(start, max(start + 1, stop)))
        return layers, [f"{name} layers={list(layers)}"]

    def check_layers(self, name: str, layers: Sequence[int] | None) -> None:
        """Raises ValueError for a layer that this model lacks, or that has no softmax attention."""
        check_wholes(name, layers, self.depth)
        for layer in layers or ():
            if self.softmax is not None and layer not in self.softmax:
                raise ValueError(
                    f"{name}: found {layer}, a layer without softmax attention; this model has it "
                    f"in {list(self.softmax)}"
                )


TowerRows: TypeAlias = Literal["cls", "patches"]


@dataclass(frozen=True)
class TowerRead:
    """The attention that each patch of an image receives in a layer of the vision tower, summed
    over heads.

    layer: index in the tower; negative from its end.
    rows: "cls" from the class token, or in a tower without one from the patches; "patches" the mean
        over the patches.
    """

    layer: int
    rows: TowerRows = "cls"


@dataclass(frozen=True)
class Patches:
    """What the vision tower attends to in the images of a prompt of N tokens.

    scores: by read, `[B, N]`, nan where there is no patch.
    image: `[B, N]` (long), the index of the image a patch is of; -1 for text, ends of lines,
        separators.
    """

    scores: Mapping[TowerRead, Tensor]
    image: Tensor


class Phase(Enum):
    """What the rows of a forward are.

    PREFILL: a whole prompt, perhaps with drafted tokens behind it.
    CHUNK: a part of a prompt that is read in several forwards.
    DECODE: one generated token.
    DRAFT: several tokens that the model or its assistant wrote.
    """

    PREFILL = "prefill"
    CHUNK = "chunk"
    DECODE = "decode"
    DRAFT = "draft"


@dataclass
class Position:
    """Where the rows of a forward stand in their conversation.

    past: number of cached tokens; in a compiled step a `StaticLength`.
    phase: what the rows are.
    prompt_rows: number of rows, the first ones, that are of a prompt; those behind were generated
        or drafted.
    prompt_end: number of keys up to the end of the prompt read last; those behind are its answer.
        In a compiled step a tensor `[1]`.
    first_prompt: it is the first prompt of its conversation.
    starts, ends: the prompt's first, its last row is among the rows.
    resumed: the rows resume a prompt of which an earlier forward read a part, taking it for a whole
        one.
    may_continue: more of the prompt may follow in a later forward.
    last_image_row: index of the last row with an image token, of the sample whose image ends first;
        None without an image in these rows.
    """

    past: Any = 0
    phase: Phase = Phase.PREFILL
    prompt_rows: int = 0
    prompt_end: Any = 0
    first_prompt: bool = False
    starts: bool = False
    ends: bool = True
    resumed: bool = False
    may_continue: bool = False
    last_image_row: int | None = None


MASKS = ("image", "query", "content", "valid", "text", "last", "seen")


@dataclass
class ForwardContext:
    """One forward of the decoder: B samples, S new rows, K keys so far (`position.past` cached ones
    and the S new). All masks are bool.

    position: where the rows stand in the conversation.
    image, query, content: `[B, K]`, keys that are image tokens, tokens of the user's question, its
        content words.
    valid: `[B, S]`, rows that are no padding.
    text: `[B, S]`, rows of text after the first image token, generated ones too.
    last: `[B, S]`, rows that predict a new token.
    seen: `[B]`, samples with an image.
    reading: the rows hold a new question, and this is the pass in which methods observe it.
    inputs: the arguments of the decoder.
    shard: which heads this process holds; what compares heads must gather them first.
    patches: of a prompt that starts here and has images, if a method reads the vision tower.
    copies: the same on other devices.
    rows: `[R]`, indices of the rows that an edit is being shown.
    """

    position: Position
    image: Tensor
    query: Tensor
    content: Tensor
    valid: Tensor
    text: Tensor
    last: Tensor
    seen: Tensor
    reading: bool
    inputs: dict[str, Any] = field(repr=False)
    shard: Shard = WHOLE
    patches: Patches | None = field(default=None, repr=False)
    # not a field of `replace`: a copy of other rows would be taken for one of these
    copies: dict[torch.device, ForwardContext] = field(default_factory=dict, init=False, repr=False)
    rows: Any = field(default=None, init=False, repr=False)

    def on(self, device: torch.device) -> ForwardContext:
        """The same with its masks on `device`, for a layer that a device map has put elsewhere."""
        if device == self.image.device:
            return self
        if device not in self.copies:
            masks = {name: getattr(self, name).to(device) for name in MASKS}
            self.copies[device] = replace(self, **masks)
        return self.copies[device]

    def answer_rows(self, prompt: bool = True) -> Tensor:
        """The rows `[B, S]` (bool) that predict a token of an answer about an image: those of
        generated tokens, and the last one of a `prompt`.
        """
        rows = self.last & self.seen[:, None]
        if self.position.may_continue:  # read up to its image, the question follows
            rows = rows & ~self.image[:, self.new]
        if not prompt:
            rows[:, : self.position.prompt_rows] = False
        return rows

    def answer_keys(self) -> Tensor:
        """The keys `[K]` (bool) behind the prompt read last, which the model generated."""
        keys = torch.arange(self.image.shape[1], device=self.image.device)
        end = self.position.prompt_end
        return keys >= (end.to(keys.device) if isinstance(end, Tensor) else end)

    def answer_lengths(self) -> Tensor:
        """How many of these keys each of the `rows` sees, its own included, `[R]`."""
        past, end = self.position.past, self.position.prompt_end
        before = (past.tensor if isinstance(past, StaticLength) else past) - end
        lengths: Tensor = self.rows + 1
        return lengths + (before.to(lengths.device) if isinstance(before, Tensor) else before)

    @property
    def new(self) -> slice:
        """Where the S new rows stand among the K keys."""
        return slice(self.position.past, self.image.shape[1])

    def newest(self, mask: Tensor, keys: int) -> Tensor:
        """The last `keys` of the K keys of a mask or of key weights `[B, ..., K]`, which are those
        that a sliding window has left.

            image = forward.newest(forward.image, weights.shape[-1])
        """
        total, past = self.image.shape[1], self.position.past
        if isinstance(past, StaticLength):
            return past.newest(mask, keys)
        return mask[..., total - keys : total]

    def among_all(self, values: Tensor) -> Tensor:
        """Values `[B, ..., k]` of the newest keys (see `newest`) among all K, 0 for the others."""
        past = self.position.past
        if isinstance(past, StaticLength):
            return past.place(values)
        return pad(values, (self.image.shape[1] - values.shape[-1], 0))


@dataclass
class Watcher:
    """Callbacks that observe an extra forward pass; all are optional.

    block: called with layer and hidden `[B, S, D]`, the residual stream entering a block.
    heads: called with layer and output `[B, S, H, Dv]`, the head outputs before the output
        projection.
    weights: called with layer, weights `[B, H, R, K]`, value `[B, KV, K, Dv]` and the attention
        module, for the rows `rows`.
    rows: `[R]`, indices.
    output: called with layer and hidden `[B, S, D]`, the residual stream leaving a block; for
        methods that edit the stream or an MLP's output.
    """

    block: Callable[[int, Tensor], None] | None = None
    heads: Callable[[int, Tensor], None] | None = None
    weights: Callable[[int, Tensor, Tensor, Any], None] | None = None
    rows: Tensor | None = None
    output: Callable[[int, Tensor], None] | None = None


@dataclass
class ExtraPrompt:
    """A second prompt that the stock model reads beside a prompt, each of its B samples as many
    tokens long.

    inputs: what the decoder is given for it: the tokens `[B, T, ...]` under the name they have
        among `ForwardContext.inputs`, left-padded; attention_mask `[B, T]`, or bool `[B, 1, T, T]`,
        or a mapping of such by kind of layer; position_ids `[B, T]`.
    watcher: observes its rows. In each layer it is called before `edit_heads` of that layer.
    """

    inputs: dict[str, Any]
    watcher: Watcher


ExtraForward: TypeAlias = Callable[[dict[str, Any], Watcher], None]
"""Runs the decoder once more on the given inputs, without a cache and with every method off."""


@dataclass(frozen=True)
class Branch:
    """A second stream of the same generation, with a cache of its own: another prompt, and then
    the tokens that the first one chose. Methods are off in it.

    image: False takes the image tokens out of the prompt; the positions of the text close up.
    prefix: text (needs the processor) or token ids, put in front of the user's question.
    pixels: makes other pixels of the same shape from those of each image: `[..., H, W]`, or the
        patches `[P, D]` of models that take them so.

        Branch(image=False)
    """

    image: bool = True
    prefix: str | tuple[int, ...] = ""
    pixels: Callable[[Tensor], Tensor] | None = None


INSIDE = (
    "observe_hidden",
    "edited_rows",
    "watched_rows",
    "edit_scores",
    "edit_weights",
    "edit_heads",
    "edit_mlp",
    "edit_hidden",
)
"""The hooks of a method that are called in a layer, or say what is done in one."""


class Method:
    """A training-free edit of a model's attention, residual stream or logits. Subclasses are frozen
    dataclasses; the fields are the hyperparameters.

    Every hook is optional. Within a layer the engine computes the scores of the rows that methods
    edit or watch, calls `edit_scores` of each method in the order given, takes one softmax, calls
    `observe` and `edit_weights` of each, multiplies with the values, and asks for `edit_heads`;
    behind the MLP it calls `edit_mlp`, behind the block `edit_hidden`, behind the last layer
    `edit_logits`. It applies the head table, batching, padding and the cache: a method never sees
    any of these.

    name: how the method is called in configs, head tables and messages.
    state: the class of what it remembers of a generation, given to every hook as `state`.
    reads_blocks: it wants `observe_hidden`.
    reads_logits: it wants `observe_readout`.
    reads_question: it wants the masks query and content.
    words: what counts as content.
    edits_prompt_end: the row it edits in a prompt is the last, wherever that turns out to be.

        @dataclass(frozen=True)
        class Sharpen(Method):
            name: ClassVar[str] = "sharpen"
            factor: float = 1.5

            def edited_rows(self, forward: ForwardContext) -> Tensor:
                return forward.last

            def edit_scores(self, layer, scores, forward, state):
                return scores * self.factor
    """

    name: ClassVar[str]
    state: ClassVar[type[State]] = State
    reads_blocks: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    reads_question: ClassVar[bool] = False
    edits_prompt_end: ClassVar[bool] = False
    words: str | Tensor = "all"

    def resolve(self, info: ModelInfo) -> tuple[Method, list[str]]:
        """This method with every None filled in, and what had to be scaled from another model, in
        words.
        """
        return self, []

    def default_layers(self, depth: int) -> Sequence[int]:
        """The layers it acts in where the user names none; of a model of `depth` layers."""
        return range(depth)

    def default_heads(self, layers: Sequence[int]) -> HeadSpec:
        """The heads it acts in where the user names none, of its `layers`."""
        return dict.fromkeys(layers, "*")

    def tower_reads(self) -> tuple[TowerRead, ...]:
        """The attention of the vision tower it wants to see; it finds it in `forward.patches`."""
        return ()

    def decides_on_last_row(self, forward: ForwardContext) -> bool:
        """Whether it chooses something in this forward by the prompt's last row."""
        return False

    def probe(
        self, forward: ForwardContext, state: Any, layers: list[int], run: ExtraForward
    ) -> Method:
        """Called before a prompt runs, for extra forward passes; `layers` are the ones switched on.
        Returns itself, or what it became by what it found out about the model.
        """
        return self

    def extra_prompt(
        self, forward: ForwardContext, state: Any, layers: list[int]
    ) -> ExtraPrompt | None:
        """Called before a prompt runs, for a second prompt to be read beside it: in the same
        forward where the model allows it, else in one before; `layers` are the ones switched on.
        """
        return None

    def report(self) -> str:
        """What it found out about the model, or is yet to find out, for people to read."""
        return ""

    def before_forward(self, forward: ForwardContext, state: Any) -> None:
        """Called when a forward starts: the place to forget the prompt before."""

    def observe_hidden(
        self, layer: int, hidden: Tensor, forward: ForwardContext, state: Any
    ) -> None:
        """Shown the residual stream `[B, S, D]` entering a block, if `reads_blocks`."""

    def observe_readout(
        self, layer: int, logits: Tensor, forward: ForwardContext, state: Any
    ) -> None:
        """Shown what the model would say of the residual stream entering a block, if
        `reads_logits`: its last norm and head, `[B, R, V]` in float32, of the R last rows, which
        are the last one of a prompt and those behind it.
        """

    def edited_rows(self, forward: ForwardContext) -> Tensor | None:
        """The rows `[B, S]` (bool) whose scores or weights it edits, or None."""
        return None

    @property
    def edits_scores(self) -> bool:
        """Whether it has an `edit_scores` of its own."""
        return type(self).edit_scores is not Method.edit_scores

    @property
    def edits_weights(self) -> bool:
        """Whether it edits weights, or says which rows to compute and edits nothing."""
        return type(self).edit_weights is not Method.edit_weights or not self.edits_scores

    @property
    def edits_heads(self) -> bool:
        """Whether it has an `edit_heads` of its own."""
        return type(self).edit_heads is not Method.edit_heads

    def edit_scores(
        self, layer: int, scores: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        """New scores for the edited rows, `[B, H, R, K]` float32, from scores that are masked,
        scaled and capped, before the softmax; K being the newest keys of `forward`.

        Not in place. Masked keys stay masked, whatever is returned for them.
        """
        return scores

    @property
    def edits_hidden(self) -> bool:
        """Whether it has an `edit_hidden` of its own."""
        return type(self).edit_hidden is not Method.edit_hidden

    @property
    def edits_mlp(self) -> bool:
        """Whether it has an `edit_mlp` of its own."""
        return type(self).edit_mlp is not Method.edit_mlp

    @property
    def in_stream(self) -> bool:
        """Whether it edits the residual stream, or reads logits off it."""
        return self.edits_mlp or self.edits_hidden or self.reads_logits

    def edit_mlp(
        self, layer: int, output: Tensor, hidden: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        """A new output `[B, S, D]` of a block's MLP, `hidden` `[B, S, D]` being what entered it.

        Not in place, here and in `edit_hidden`. Whatever is returned for them, padding and samples
        without an image stay stock. A layer is on or off as a whole: its row of the head table.
        """
        return output

    def edit_hidden(
        self, layer: int, hidden: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        """A new residual stream `[B, S, D]` leaving a block."""
        return hidden

    def watched_rows(self, forward: ForwardContext) -> tuple[Sequence[int], Tensor] | None:
        """Layers, and the rows `[B, S]` (bool) whose weights it must be shown in each of them."""
        return None

    def observe(
        self, layer: int, weights: Tensor, rows: Tensor, forward: ForwardContext, state: Any
    ) -> None:
        """Shown the weights `[B, H, R, K]` of the watched rows, `rows` `[R]` being their indices in
        the forward.
        """

    def edit_weights(
        self, layer: int, weights: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor:
        """New weights for the edited rows, `[B, H, R, K]` float32, K being the newest keys of
        `forward`.
        """
        return weights

    def edit_heads(
        self, layer: int, output: Tensor, forward: ForwardContext, state: Any
    ) -> Tensor | None:
        """A gain `[B, H]` for the head outputs `[B, S, H, Dv]` of all rows, or None."""
        return None

    def settled_gain(self, layer: int, state: Any) -> Tensor | None:
        """What `edit_heads` gives from now on, if that is known before the head outputs are."""
        return None

    @property
    def acts_in_layers(self) -> bool:
        """Whether it acts or looks on inside the layers, so that its head table means something;
        not if it does nothing but edit logits.
        """
        kind = type(self)
        inside = any(
            getattr(kind, hook, None) is not getattr(Method, hook, None) for hook in INSIDE
        )
        return inside or not self.edits_logits

    @property
    def edits_logits(self) -> bool:
        """Whether it has an `edit_logits` of its own."""
        return type(self).edit_logits is not Method.edit_logits

    def branches(self) -> Mapping[str, Branch]:
        """The second streams whose logits it wants, by names of its own."""
        return {}

    def early_layers(self) -> Sequence[int]:
        """The layers whose input it wants to see as logits: the residual stream entering them
        (`hidden_states` of transformers by the same index) through the model's last norm and head.
        """
        return ()

    def edit_logits(
        self,
        logits: Tensor,
        others: Mapping[str | int, Tensor],
        forward: ForwardContext,
        state: Any,
    ) -> Tensor:
        """New logits `[B, R, V]` in float32 for the R last rows of the forward, those that predict
        a new token: one, or more where drafts are verified. Not in place.

        others: the logits `[B, R, V]` of its branches by name, of its early layers by index. What
        it returns is the model's own output, so that every way of decoding sees it.
        """
        return logits
