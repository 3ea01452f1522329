"""Rows of attention for the kernels, and what defines them; on any device."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.support.on_device import CPU, moved
from vlm_patch import GIFT, VAR, ForwardContext, Phase, Position
from vlm_patch.engine.attention import Call
from vlm_patch.engine.kernels.layer import Edit, LayerKernel, Rows
from vlm_patch.methods import gift, var

STOCK = 7.0
"""What stands in the stock output."""
DIMS = (3, 10)


@dataclass(frozen=True)
class Shape:
    """A batch of 2. spare: unused keys of a static cache. behind: keys out of a sliding window.
    count: rows that are edited, the last ones, of `new`. padded: the second sample's first keys are
    hidden by a mask. switched: every second head is off. streamed: the new key's groups are found
    by the kernel.
    """

    heads: int = 4
    kv: int = 2
    keys: int = 70
    size: int = 16
    width: int = 16
    new: int = 1
    count: int = 1
    spare: int = 0
    behind: int = 0
    padded: bool = False
    switched: bool = False
    streamed: bool = False
    softcap: float | None = None
    stream: int = 24


SHAPES = {
    "part of a block": Shape(kv=4, keys=11),
    "grouped, odd sizes, a longer cache": Shape(heads=6, size=24, width=20, spare=5),
    "padding, heads off": Shape(padded=True, switched=True),
    "a window, softcap": Shape(keys=130, behind=20, softcap=2.0),
    "a new key": Shape(streamed=True),
    "rows of a prompt": Shape(kv=4, keys=30, new=30, count=3),
    "padded rows, heads off": Shape(
        heads=6, keys=30, new=12, count=3, spare=3, padded=True, switched=True
    ),
}
CARD = {
    "LLaVA-1.5-7B": Shape(32, 32, 700, 128, 128, streamed=True, stream=4096),
    "LLaVA-1.5-7B, long": Shape(32, 32, 3001, 128, 128, streamed=True, stream=4096),
    "LLaVA-1.5-7B, prompt": Shape(32, 32, 700, 128, 128, new=700, count=70),
    "Qwen2-VL-7B": Shape(28, 4, 700, 128, 128, padded=True, switched=True),
    "Qwen2-VL-7B, prompt": Shape(28, 4, 700, 128, 128, new=700, count=70, padded=True),
    "Gemma 2": Shape(8, 4, 700, 256, 256, softcap=50.0),
}
EDITS: dict[str, tuple[Any, ...]] = {
    "var": (VAR(0.7, 0.1, 0.1, tau=3.0, dims=DIMS),),
    "gift": (GIFT(2.0, beta=1.3, head_fraction=0.4),),
    "var, gift": (VAR(0.7, 0.1, 0.1, tau=3.0, dims=DIMS), GIFT(2.0, beta=1.3)),
    "gift, var": (GIFT(2.0, beta=1.3), VAR(0.7, 0.1, 0.1, tau=3.0, dims=DIMS)),
    "shares by torch": (VAR(0.7, 0.1, 0.1, tau=3.0, dims=DIMS, require_visual_sink=True),),
    "gift, shares by torch": (
        GIFT(2.0, beta=1.3),
        VAR(0.7, 0.1, 0.1, tau=3.0, dims=DIMS, require_visual_sink=True),
    ),
}


@dataclass
class Case:
    """A call, the methods that edit it, and what is known of its keys."""

    call: Call
    edits: list[Edit]
    rows: Rows
    forward: Any
    hidden: Tensor | None

    @property
    def first(self) -> int:
        return self.rows.first

    def by_torch(self) -> tuple[Tensor, list[Tensor]]:
        """The rows `[B, R, H, Dv]`, and the groups of each method, by the definitions."""
        forward, keys = self.forward, self.forward.image.shape[1]
        for edit in self.edits:
            if self.hidden is not None and edit.method.reads_blocks:
                edit.method.observe_hidden(0, self.hidden, forward, edit.state)
        call = self.call.without_tail(keys)
        index = torch.arange(self.first, self.first + self.rows.count, device=call.query.device)
        weights = call.weights(index)
        for edit in self.edits:
            new = edit.method.edit_weights(0, weights, forward, edit.state)
            on = edit.on
            weights = new if on is None else torch.where(on[:, None, None], new, weights)
        return call.output(weights), self.groups()

    def by_kernel(self) -> tuple[Tensor, list[Tensor]]:
        """The same by the kernels, called twice: what they share must be left as it was."""
        call, stock = self.call, None
        for edit in self.edits:
            if self.hidden is not None and edit.method.reads_blocks:
                edit.state.groups[0][..., self.forward.position.past :] = STOCK
        if self.rows.picked is not None:
            shape = (*call.query.shape[::2], call.query.shape[1], call.value.shape[3])
            stock = call.query.new_full(shape, STOCK)
        kernel = LayerKernel(call, self.edits, self.rows, self.hidden)
        parts = (0, call.query, call.key, call.value, call.mask, self.forward)
        for _ in range(2):
            output = kernel(*parts, hidden=self.hidden, output=stock)
        assert (output[:, : self.first] == STOCK).all()
        return output[:, self.first :], self.groups()

    def groups(self) -> list[Tensor]:
        keys = self.forward.image.shape[1]
        return [e.method.groups(0, self.forward, e.state)[..., :keys].clone() for e in self.edits]

    def edited(self) -> Tensor:
        """Which rows and heads `[B, R, H]` the kernels write."""
        batch, heads = len(self.call.query), self.call.query.shape[1]
        wanted = torch.ones(batch, self.rows.count, heads, dtype=torch.bool)
        wanted = wanted.to(self.call.query.device)
        if self.rows.picked is not None:
            wanted &= self.rows.picked[:, self.first :, None] != 0
            if self.edits[0].on is not None:
                wanted &= self.edits[0].on
        return wanted


def case(
    methods: Sequence[Any],
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Case:
    generator = torch.Generator().manual_seed(shape.heads + shape.keys)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(device)

    heads, new, total = shape.heads, shape.new, shape.keys + shape.behind
    query = draw(2, heads, new, shape.size)
    key, value = (
        draw(2, shape.kv, shape.keys + shape.spare, size) for size in (shape.size, shape.width)
    )
    mask = torch.ones(2, 1, new, key.shape[2], dtype=torch.bool).tril(shape.keys - new)
    mask[1, ..., : shape.keys // 3] = False
    image = torch.zeros(2, total, dtype=torch.bool)
    image[:, total // 4 : total // 2] = True
    phase = Phase.DECODE if new == 1 else Phase.PREFILL
    forward = forward_of(image.to(device), Position(total - new, phase))
    on = moved(torch.arange(heads) % 2 == 0, device) if shape.switched else None
    edits = []
    for method in methods:
        state: Any = var.SinkState() if method.reads_blocks else gift.GazeState()
        room = torch.zeros(2, 4, total + 9)
        if method.reads_blocks:
            sinks = torch.rand(2, total, generator=generator) < 0.4
            room[..., :total] = var.key_groups(image, sinks)
            state.groups[0] = room.to(device)
        else:
            gain = 1 + (largest_gain(method) - 1) * torch.rand(2, total, generator=generator)
            room[..., :total] = gift.key_groups(image, ~image, gain)
            state.groups = room.to(device)
        edits.append(Edit(method, state, on))
    hidden = None
    if shape.streamed and any(method.reads_blocks for method in methods):
        hidden = draw(2, 1, shape.stream)
        hidden[0, 0, DIMS[0]] = 40.0
    picked = None
    if new > 1:
        picked = torch.zeros(2, new, dtype=torch.uint8)
        picked[:, new - shape.count :] = 1
        picked[0, new - shape.count] = 0
        picked = picked.to(device)
    options = {} if shape.softcap is None else {"softcap": shape.softcap}
    call = Call(
        0,
        SimpleNamespace(is_causal=True),
        query,
        key,
        value,
        mask.to(device) if shape.padded else None,
        options,
        lambda: (query, None),
    )
    return Case(call, edits, Rows(new - shape.count, shape.count, picked), forward, hidden)


def forward_of(image: Tensor, position: Position) -> ForwardContext:
    """A forward of whose keys `[B, K]` these are image tokens."""
    rows = torch.ones_like(image[:, position.past :])
    keys = {"image": image, "query": ~image, "content": ~image}
    seen = image.any(1)
    return ForwardContext(
        position, **keys, valid=rows, text=rows, last=rows, seen=seen, reading=False, inputs={}
    )


def largest_gain(method: GIFT) -> float:
    """The largest gain of a method."""
    return float(torch.tensor(method.alpha or 0.0).exp())


def far(found: Tensor, expected: Tensor, where: Tensor) -> float:
    """The largest difference in the rows and heads `where`."""
    apart = (found.float() - expected.float()).abs().amax(-1)
    return float(apart.masked_fill(~where, 0.0).max())
