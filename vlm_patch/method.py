"""What a method is, and what it is shown."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from vlm_patch import cpu
from vlm_patch.models.tensor_parallel import WHOLE, Shard

Memory: TypeAlias = dict[tuple[str, int], Tensor]
"""What one method remembers of one generation, by name and layer.

Every tensor has the batch first, so that beams can be reordered without knowing what it is."""


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs a microsecond even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def room(memory: Memory, key: tuple[str, int], total: int) -> Tensor | None:
    """The buffer kept under `key`, if `total` entries can be written to it as it is."""
    buffer = memory.get(key)
    if buffer is None or buffer.shape[-1] < total:
        return None
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return None
    return buffer


def append(memory: Memory, key: tuple[str, int], new: Tensor, past: int) -> Tensor:
    """Writes `new` `[B, ..., S]` behind the first `past` entries kept under `key`; returns the
    buffer `[B, ..., at least past + S]` that holds them all.

    It doubles when it is full, so that a step of decoding writes one column.
    """
    total = past + new.shape[-1]
    buffer = room(memory, key, total)
    if buffer is None:
        before = memory.get(key)
        buffer = new.new_zeros(*new.shape[:-1], max(256, 2 * total))
        if before is not None:
            buffer[..., :past] = before[..., :past]
        memory[key] = buffer
    buffer.narrow(-1, past, new.shape[-1]).copy_(new)
    return buffer


@dataclass(frozen=True)
class Facts:
    """What a method may know of the model when it fills in its defaults.

    profile: the published defaults of this method for this model, empty where none are known.
    softmax: the layers with softmax attention, which are the only ones to act in; None for all.
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
    """A look at the vision tower while it encodes images: how much attention each patch gets in
    `layer` (of the tower; negative from its end), summed over heads.

    rows: "cls" from the class token, or in a tower without one from the patches; "patches" the mean
    over the patches.
    """

    layer: int
    rows: TowerRows = "cls"


@dataclass(frozen=True)
class Patches:
    """What the vision tower looks at in the images of a prompt of N tokens.

    scores: by read, `[B, N]`, nan where there is no patch. image `[B, N]` (long): which image of
    the prompts a patch is of; -1 for text, ends of lines, separators.
    """

    scores: Mapping[TowerRead, Tensor]
    image: Tensor


MASKS = ("image", "query", "content", "valid", "text", "last", "seen")


@dataclass
class Forward:
    """One forward of the decoder: B samples, S new rows, K keys so far (`past` cached ones and the
    S new).

    All masks are bool. image, query, content `[B, K]`: keys that are image tokens, tokens of the
    user's question, and its content words. valid, text, last `[B, S]`: rows that are no padding;
    rows of text after the first image token (generated ones too); rows that predict a new token.
    seen `[B]`: samples with an image. reading: the rows hold a new question, and this is the pass
    in which methods look at how it is read. generated: the one row is a generated token.

    prompt: how many rows, the first ones, are of a prompt; those behind were generated or drafted.
    first: it is the first prompt of its conversation. starts, ends: its first, its last row is
    among them; a long one may be read in several forwards. shard: which heads are at hand; what
    compares heads must gather them first. patches: of a prompt that starts here and has images,
    all of it, if a method reads the tower. copies: on other devices.

    resumed: the rows go on with a prompt of which an earlier forward read a part, taking it for a
    whole one. open: more of the prompt may follow in a later forward. edge: the last row with an
    image token, of the sample whose image ends first; None without an image in these rows.
    """

    past: int
    image: Tensor
    query: Tensor
    content: Tensor
    valid: Tensor
    text: Tensor
    last: Tensor
    seen: Tensor
    reading: bool
    inputs: dict[str, Any] = field(repr=False)
    generated: bool = False
    prompt: int = 0
    first: bool = False
    starts: bool = False
    ends: bool = True
    resumed: bool = False
    open: bool = False
    edge: int | None = None
    shard: Shard = WHOLE
    patches: Patches | None = field(default=None, repr=False)
    # not a field of `replace`: a copy of other rows would be taken for one of these
    copies: dict[torch.device, Forward] = field(default_factory=dict, init=False, repr=False)

    def on(self, device: torch.device) -> Forward:
        """The same with its masks on `device`, for a layer that a device map has put elsewhere."""
        if device == self.image.device:
            return self
        if device not in self.copies:
            masks = {name: getattr(self, name).to(device) for name in MASKS}
            self.copies[device] = replace(self, **masks)
        return self.copies[device]

    @property
    def new(self) -> slice:
        """Where the S new rows stand among the K keys."""
        return slice(self.past, self.image.shape[1])


@dataclass
class Watcher:
    """Looks on during a pass of the stock model that a method asked for; all callbacks are
    optional.

    block(layer, hidden `[B, S, D]`): the residual stream entering a block. heads(layer, output `[B,
    S, H, Dv]`): head outputs before the output projection. weights(layer, weights `[B, H, R, K]`,
    value `[B, KV, K, Dv]`, attention module): rows `rows` `[R]`.
    """

    block: Callable[[int, Tensor], None] | None = None
    heads: Callable[[int, Tensor], None] | None = None
    weights: Callable[[int, Tensor, Tensor, Any], None] | None = None
    rows: Tensor | None = None


StockPass: TypeAlias = Callable[[dict[str, Any], Watcher], None]
"""Runs the decoder once more on the given inputs, without cache and with every method off."""


class Method:
    """A training-free edit of attention. Subclasses are frozen dataclasses; the fields are the
    hyperparameters.

    Within a layer the core computes the scores of the rows that methods edit or watch, calls
    `edit_scores` of each method in the order given, takes one softmax, calls `observe` and
    `weights` of each, multiplies with the values, and asks for `output_gain`. It also applies the
    head table, batching, padding and the cache: a method never sees any of these. `reads_blocks`
    asks for `block_input`, `reads_question` for the masks query and content; `words` says what
    counts as content; `edits_prompt_end` says that the row it edits in a prompt is the last,
    wherever that turns out to be.
    """

    name: ClassVar[str]
    reads_blocks: ClassVar[bool] = False
    reads_question: ClassVar[bool] = False
    edits_prompt_end: ClassVar[bool] = False
    words: str | Tensor = "all"

    def fit(self, facts: Facts) -> tuple[Method, list[str]]:
        """Self with every None filled in, and what had to be scaled from another model, in
        words.
        """
        return self, []

    def own_layers(self, depth: int) -> list[int]:
        """The layers it acts on by default."""
        return list(range(depth))

    def tower_reads(self) -> tuple[TowerRead, ...]:
        """What it must see of the vision tower; it finds it in `forward.patches`."""
        return ()

    def settles(self, forward: Forward) -> bool:
        """Whether it chooses something in this forward by the prompt's last row."""
        return False

    def look(self, forward: Forward, memory: Memory, layers: list[int], run: StockPass) -> Method:
        """Called before a prompt runs, for passes of its own; `layers` are the ones switched on."""
        return self

    def finding(self) -> str:
        """What it found out about the model, or is yet to find out, for people to read."""
        return ""

    def begin(self, forward: Forward, memory: Memory) -> None:
        """Called when a forward starts: the place to forget the prompt before."""

    def block_input(self, layer: int, hidden: Tensor, forward: Forward, memory: Memory) -> None:
        """Shown the residual stream `[B, S, D]` entering a block, if `reads_blocks`."""

    def edited(self, forward: Forward) -> Tensor | None:
        """The rows `[B, S]` whose scores or weights it rewrites, or None."""
        return None

    @property
    def edits_scores(self) -> bool:
        """Whether it has an `edit_scores` of its own."""
        return type(self).edit_scores is not Method.edit_scores

    @property
    def edits_weights(self) -> bool:
        """Whether it edits weights, or says which rows to compute and edits nothing."""
        return type(self).weights is not Method.weights or not self.edits_scores

    def edit_scores(self, layer: int, scores: Tensor, forward: Forward, memory: Memory) -> Tensor:
        """New scores for the edited rows, `[B, H, R, K]` float32, from scores that are masked,
        scaled and capped, and wait for the softmax; K being the newest keys of `forward`.

        Not in place. Masked keys stay masked, whatever comes back for them.
        """
        return scores

    def watched(self, forward: Forward) -> tuple[Sequence[int], Tensor] | None:
        """Layers, and the rows `[B, S]` that it must be shown in each of them."""
        return None

    def observe(
        self, layer: int, weights: Tensor, rows: Tensor, forward: Forward, memory: Memory
    ) -> None:
        """Shown the weights `[B, H, R, K]` of the watched rows, `rows` `[R]` being their indices in
        the forward.
        """

    def weights(self, layer: int, weights: Tensor, forward: Forward, memory: Memory) -> Tensor:
        """New weights for the edited rows, `[B, H, R, K]` float32, K being the newest keys of
        `forward`.
        """
        return weights

    def output_gain(
        self, layer: int, output: Tensor, forward: Forward, memory: Memory
    ) -> Tensor | None:
        """A gain `[B, H]` for the head outputs `[B, S, H, Dv]` of all rows, or None."""
        return None


Shares: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From masses `[B, G, H, R]` of key groups `[B, G, K]`, and these groups, to shares
`[B, G, H, R]`."""


def reweigh(weights: Tensor, groups: Tensor, shares: Shares) -> Tensor:
    """Weights multiplied by one factor per key, made of groups of keys.

    weights a `[B, H, R, K]`, rows that sum to 1. groups `[B, G, K]`: each key's part in G groups.
    With the masses m_g = sum_k a_k groups_gk and c = shares(m, groups), the new weights are
    a_k sum_g c_g groups_gk.
    """
    groups, flat = cast(groups, weights.dtype), weights.flatten(1, 2)
    masses = torch.bmm(groups, flat.transpose(1, 2))
    parts = shares(masses.view(*groups.shape[:2], *weights.shape[1:3]), groups)
    factor = torch.bmm(parts.flatten(2).transpose(1, 2), groups)
    # in place where autograd allows it: fresh memory of this size costs more than the product
    return (flat * factor if flat.requires_grad else factor.mul_(flat)).view_as(weights)


class Regrouping(Method, ABC):
    """A method whose edit is one factor per key, made of groups of keys (see `reweigh`).

    Whatever has this form runs as two small kernels at a generated token on a GPU, and by `row` on
    a CPU. compares_heads: a head's shares depend on the masses of the others.
    """

    compares_heads: ClassVar[bool] = False

    def groups(self, layer: int, forward: Forward, memory: Memory) -> Tensor:
        """The groups `[B, G, K]` of all keys so far, or of more than these."""
        return memory["groups", layer]

    @abstractmethod
    def shares(self, masses: Tensor, groups: Tensor) -> Tensor:
        """What each group adds to the factor of its keys, `[B, G, H, R]`; see `reweigh`.

        groups: of all keys so far; masses lie on those that a sliding window has left.
        """

    def parts(
        self, keys: int, layer: int, forward: Forward, memory: Memory
    ) -> tuple[Tensor, Shares]:
        """The groups `[B, G, keys]` of the newest keys, which are those that a sliding window has
        left, and the shares by masses on them.
        """
        newest, every = self._newest(keys, layer, forward, memory)
        return newest, self._shares_by(newest, every, forward)

    def weights(self, layer: int, weights: Tensor, forward: Forward, memory: Memory) -> Tensor:
        newest, every = self._newest(weights.shape[-1], layer, forward, memory)
        if weights.shape[2] == 1 and cpu.serves(weights) and self._sees_all(forward):
            edited = self.row(weights, cast(newest, weights.dtype))
            if edited is not None:
                return edited
        return reweigh(weights, newest, self._shares_by(newest, every, forward))

    def row(self, weights: Tensor, groups: Tensor) -> Tensor | None:
        """The same for one row `[B, H, 1, K]` by a compiled loop on a CPU; None if there is none
        for it.
        """
        return None

    def _newest(
        self, keys: int, layer: int, forward: Forward, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """The groups of the newest keys and of all, which are the same object without a window."""
        total = forward.image.shape[1]
        every = self.groups(layer, forward, memory).narrow(-1, 0, total)
        if every.device != forward.image.device:
            every = every.to(forward.image.device)
        return every if keys == total else every[..., total - keys :], every

    def _sees_all(self, forward: Forward) -> bool:
        """Whether all heads that it has to see are computed here."""
        return forward.shard.ranks == 1 or not self.compares_heads

    def _shares_by(self, newest: Tensor, every: Tensor, forward: Forward) -> Shares:
        """`_shares_in` by masses on the newest keys, but shown the groups of all."""
        shares = self._shares_in(forward)
        return shares if newest is every else lambda masses, _: shares(masses, every)

    def _shares_in(self, forward: Forward) -> Shares:
        """`shares`, shown all heads where other processes compute some of them."""
        shard = forward.shard
        if self._sees_all(forward):
            return self.shares
        return lambda m, groups: shard.mine(self.shares(shard.gather(m, 2), groups), 2)


def check_number(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> None:
    """Raises ValueError unless `value` is a finite number in [low, high] (in (low, high] if
    `above`).
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (above and value == low):
        if high < math.inf:
            wanted = f"a number from {low:g} to {high:g}"
        elif low == -math.inf:
            wanted = "a finite number"
        else:
            wanted = f"a finite number {'above' if above else 'of at least'} {low:g}"
        raise ValueError(f"{name}: found {value!r}, expected {wanted}")


def check_whole(name: str, value: int, size: int | None = None) -> None:
    """Raises ValueError unless `value` is a whole number of at least 0, and below `size` where that
    is known.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: found {value!r}, expected a whole number of at least 0")
    if size is not None and value >= size:
        raise ValueError(f"{name}: found {value}, but this model has only 0 to {size - 1}")


def check_wholes(name: str, values: Sequence[int] | None, size: int | None = None) -> None:
    """The same for every one of a sequence of layers or channels; None is none."""
    if values is not None and not isinstance(values, list | tuple | range):
        raise ValueError(
            f"{name}: found {values!r}, expected a list or a range of whole numbers, such as [1, 2]"
        )
    for value in values or ():
        check_whole(name, value, size)


def check_flag(name: str, value: bool) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: found {value!r}, expected True or False")
