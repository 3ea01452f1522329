"""Which method edits which rows of a layer's attention, in chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor

from vlm_patch.method import Method, State


@dataclass
class ActiveMethod:
    """A method in one forward.

    method, state: the method, and what it remembers of this generation.
    heads: by layer that is on, the heads that are `[H]`; None for all of them.
    """

    method: Method
    state: State
    heads: dict[int, Tensor | None]


class Stage(Enum):
    """When a method acts on a row of attention: on the scores before the softmax, by a look at the
    weights, on the weights.
    """

    SCORES = "scores"
    WATCH = "watch"
    WEIGHTS = "weights"


@dataclass
class RowEdit:
    """What a method does to rows of a layer's attention.

    stage: when it acts.
    mask: `[B, S]`, the rows.
    heads: `[H]`, None for all.
    """

    active: ActiveMethod
    stage: Stage
    mask: Tensor
    heads: Tensor | None

    @property
    def edits(self) -> bool:
        return self.stage is not Stage.WATCH

    @property
    def key(self) -> tuple[str, Stage]:
        return self.active.method.name, self.stage


@dataclass
class RowChunk:
    """What an edit does in a chunk of rows.

    task: its index in the layer's edits.
    index: `[r]`, its rows in the chunk, None for all of them.
    mask: `[B, r]`, which of these per sample, None for all.
    """

    task: int
    index: Tensor | None
    mask: Tensor | None


RowPlan: TypeAlias = list[tuple[Tensor, list[RowChunk]]]
"""Chunks of rows `[R]` and what is done to them."""


def chunks(tasks: list[RowEdit], size: int) -> RowPlan:
    """The rows that some task wants, in chunks of at most `size` rows."""
    if not tasks:
        return []
    masks = [task.mask for task in tasks]
    union = torch.stack([mask.any(0) for mask in masks]).any(0).nonzero().flatten()
    return [(rows, _parts(tasks, rows)) for rows in torch.split(union, size) if len(rows)]


def _parts(tasks: list[RowEdit], rows: Tensor) -> list[RowChunk]:
    parts = []
    for i, task in enumerate(tasks):
        here = task.mask[:, rows]
        index = here.any(0).nonzero().flatten()
        if len(index):
            here = here[:, index]
            everywhere = len(index) == len(rows)
            parts.append(RowChunk(i, None if everywhere else index, None if here.all() else here))
    return parts


def written(
    edits: list[tuple[RowChunk, Tensor | None]], shape: torch.Size, device: torch.device
) -> Tensor:
    """Which rows and heads of a chunk some method edits, `[B, R, H]`."""
    keep = torch.zeros(shape, dtype=torch.bool, device=device)
    for part, heads in edits:
        mask = torch.ones((), dtype=torch.bool, device=device)
        if part.mask is not None:
            mask = mask & part.mask[:, :, None]
        if heads is not None:
            mask = mask & heads
        if part.index is None:
            keep |= mask
        else:
            keep[:, part.index] |= mask
    return keep
