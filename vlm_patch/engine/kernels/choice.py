"""Which kernels do what is to be done in a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_patch.engine.attention import Call
from vlm_patch.engine.kernels.layer import GROUPS, Edit, LayerKernel, Rows, serves
from vlm_patch.engine.plans import ActiveMethod, RowEdit
from vlm_patch.method import ForwardContext
from vlm_patch.primitives.reweighting import KeyReweighting

MOST_METHODS = 2


class LayerKernels:
    """The kernels of a forward, made once for all layers that are alike."""

    def __init__(self) -> None:
        self.rows: dict[Any, list[tuple[tuple[int, ...], Rows]]] = {}
        self.made: dict[Any, LayerKernel] = {}

    def of(
        self,
        call: Call,
        tasks: Sequence[RowEdit],
        forward: ForwardContext,
        entering: tuple[ActiveMethod, Tensor] | None,
        settled: bool,
    ) -> list[LayerKernel]:
        """The kernels that do all of the tasks of a layer, one for each set of methods that share
        rows; none where they cannot.

        entering: a method whose groups of the new key are still to be found, and the stream that
        enters the block. settled: the gain of the head outputs is known.
        """
        if not 0 < len(tasks) <= MOST_METHODS or not serves(call):
            return []
        if not all(_reweights(task, call.layer, forward) for task in tasks):
            return []
        names = call.query.device, tuple(task.key for task in tasks)
        if names not in self.rows:
            self.rows[names] = shared_rows([task.mask for task in tasks])
        look = call.mask is None, call.causal, call.scaling, call.options.get("softcap")
        shapes = call.query.shape, call.key.shape, call.value.shape[3], call.query.dtype
        found = []
        for of, rows in self.rows[names]:
            mine: list[Any] = [tasks[i] for i in of]
            edits = [Edit(task.active.method, task.active.state, task.heads) for task in mine]
            alone = rows.picked is None
            owner = None if entering is None else entering[0]
            new = entering if alone and any(task.active is owner for task in mine) else None
            switched = call.layer if any(edit.on is not None for edit in edits) else None
            scaled = settled and alone
            key = names, of, look, shapes, new is None, switched, scaled
            if key not in self.made:
                hidden = None if new is None else new[1]
                self.made[key] = LayerKernel(call, edits, rows, hidden, scaled)
            found.append(self.made[key])
        return found


def _reweights(task: RowEdit, layer: int, forward: ForwardContext) -> bool:
    """Whether a task is a key reweighting of four groups, and nothing else."""
    active = task.active
    kind: Any = type(active.method)
    inherits = getattr(kind, "edit_weights", None) is KeyReweighting.edit_weights
    if not inherits or task.stage.value != "weights":
        return False
    method: Any = active.method
    return bool(method.groups(layer, forward, active.state).shape[1] == GROUPS)


def shared_rows(masks: Sequence[Tensor]) -> list[tuple[tuple[int, ...], Rows]]:
    """The rows that the same masks `[B, S]` hold, for each set of masks that shares any."""
    found = []
    every = torch.stack(list(masks))
    for number in range(1, 2 ** len(masks)):
        of = tuple(i for i in range(len(masks)) if number >> i & 1)
        wanted = every.new_tensor([i in of for i in range(len(masks))])
        mask = (every == wanted[:, None, None]).all(0)
        index = mask.any(0).nonzero().flatten()
        if len(index):
            first, last = int(index[0]), int(index[-1])
            alone = mask.shape[1] == 1 and bool(mask.all())
            found.append((of, Rows(first, last + 1 - first, None if alone else mask.contiguous())))
    return found
