"""What happens in the attention of one forward: the stock kernel, plus edited rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_patch.engine.attention import Call, ForwardHandler, check, softmax
from vlm_patch.engine.kernels.choice import LayerKernels
from vlm_patch.engine.kernels.layer import LayerKernel, finds_groups, write_groups
from vlm_patch.engine.plans import (
    ActiveMethod,
    RowChunk,
    RowEdit,
    RowPlan,
    Stage,
    chunks,
    written,
)
from vlm_patch.method import ForwardContext, Method, Phase, Watcher
from vlm_patch.primitives import dispatch
from vlm_patch.primitives.reweighting import KeyReweighting

WEIGHTS_BUDGET = 64 * 2**20
"""Bytes of explicit attention weights held at once; more rows are done in chunks."""
COPIES = 4
"""Tensors of that size that live at once while rows are edited."""


@dataclass
class Watching(ForwardHandler):
    """A pass of the stock model for a method that looks on."""

    watcher: Watcher

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        output, weights = call.stock()
        if self.watcher.heads is not None:
            self.watcher.heads(call.layer, output)
        if self.watcher.weights is not None and self.watcher.rows is not None:
            rows = self.watcher.rows.to(call.query.device)
            self.watcher.weights(call.layer, call.weights(rows), call.value, call.module)
        return output, weights


@dataclass
class LayerPlan:
    """What is done in one layer.

    tasks: edits of rows, in order.
    output_gains: the methods that may scale its head outputs, with their heads `[H]`, None for all.
    plan: the rows in chunks.
    replaces_all_rows: every row and head is edited, so that the stock kernel need not run.
    kernels: that do all of it, where they can; those of an only row need no stock kernel either.
    trusted: they have agreed with plain torch.
    alone: one kernel does all, a row for every sample.
    """

    tasks: list[RowEdit]
    output_gains: list[tuple[ActiveMethod, Tensor | None]]
    plan: RowPlan
    replaces_all_rows: bool
    kernels: list[LayerKernel]
    trusted: bool = False

    @property
    def alone(self) -> bool:
        few = len(self.kernels) == 1 and self.kernels[0].rows.picked is None
        return self.trusted and few and (self.kernels[0].scaled or not self.output_gains)


class Editing(ForwardHandler):
    """A forward in which methods act, in the order given.

    What is to be done in a layer stays the same while tokens are generated, so one object serves
    all these steps (`go_on`), and no step has to ask the device again.

    shows: the user wants to see the weights, where the stock kernel has any.
    """

    def __init__(self, forward: ForwardContext, actives: list[ActiveMethod], shows: bool) -> None:
        self.forward, self.actives, self.shows = forward, actives, shows
        self._edited = [active.method.edited_rows(forward) for active in actives]
        self._watched = [active.method.watched_rows(forward) for active in actives]
        self._plans: dict[Any, RowPlan] = {}
        self._kernels = LayerKernels()
        self._work: dict[int, LayerPlan | None] = {}
        self._alone: dict[int, LayerPlan] = {}
        self._gains: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self.idle = self._idle = set[int]()
        self._entering: dict[int, tuple[ActiveMethod, Tensor]] = {}
        self._finders = [active for active in actives if _finds_groups(active.method)]

    def serves(self, actives: list[ActiveMethod], forward: ForwardContext) -> bool:
        """Whether as many rows are edited by the same methods in the same layers and heads."""
        same = forward.valid.shape == self.forward.valid.shape
        return (
            same
            and len(actives) == len(self.actives)
            and all(
                old.method is new.method and old.heads is new.heads and old.state is new.state
                for old, new in zip(self.actives, actives, strict=True)
            )
        )

    def go_on(self, forward: ForwardContext) -> None:
        """Takes the next generated tokens."""
        self.forward = forward
        self._entering.clear()  # of a forward that an error ended

    def enter_block(self, layer: int, hidden: Tensor) -> None:
        """Shows methods the residual stream `[B, S, D]` entering a block.

        Where kernels find what a method looks for, it is left to those of the attention to come for
        a generated token, and to one of its own for other rows.
        """
        forward = self.forward.on(hidden.device)
        fast = dispatch.possible(hidden.device.type) and hidden.ndim == 3 and hidden.stride(2) == 1
        for active in self.actives:
            if not active.method.reads_blocks or layer not in active.heads:
                continue
            if not fast or active not in self._finders:
                active.method.observe_hidden(layer, hidden, forward, active.state)
            elif forward.position.phase is Phase.DECODE and layer not in self._entering:
                self._entering[layer] = active, hidden
            else:
                self._find_groups(layer, hidden, active, forward)

    def _find_groups(
        self, layer: int, hidden: Tensor, active: ActiveMethod, forward: ForwardContext
    ) -> None:
        method: Any = active.method

        def found() -> Tensor:
            groups: Tensor = method.groups(layer, forward, active.state)
            return groups[..., forward.new].transpose(1, 2)

        def by_torch() -> Tensor:
            method.observe_hidden(layer, hidden, forward, active.state)
            return found()

        def by_kernel() -> Tensor:
            write_groups(method, layer, hidden, forward, active.state)
            return found()

        kind = ("groups", method.name, str(hidden.device), hidden.dtype, hidden.shape[2])
        dispatch.tried(kind, by_kernel, by_torch)

    def attend(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if call.layer not in self._work:
            self._work[call.layer] = self._prepare(call)
        work, entering = self._work[call.layer], self._entering.pop(call.layer, None)
        output = None if work is None else self._by_kernels(call, work, entering)
        if output is None:
            self._look_at(call.layer, entering)
        if work is None:
            return call.stock()
        cut = call.without_tail(self.forward.image.shape[1])
        if output is None:
            output = self._scaled(call.layer, self._rows(cut, work), work)
        return output, self._shown(call.stock()[1], cut, work) if self.shows else None

    def attend_row(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        work, entering = self._alone.get(layer), self._entering.get(layer)
        if work is None or self.shows:
            return None
        kernel, hidden = work.kernels[0], None if entering is None else entering[1]
        gain = _settled(layer, work.output_gains) if kernel.scaled else None
        fits = kernel.fits(query, key, value, mask, hidden)
        if not fits or (gain is None) == kernel.scaled:
            return None
        forward = self.forward.on(query.device)
        if entering is not None:
            del self._entering[layer]
            method: Any = entering[0].method
            method.make_room(layer, forward, entering[0].state)
        return kernel(layer, query, key, value, mask, forward, hidden, gain)

    def _scaled(self, layer: int, output: Tensor, work: LayerPlan) -> Tensor:
        """Head outputs `[B, S, H, Dv]` multiplied by the methods' gains."""
        for active, heads in work.output_gains:
            gain = self._gain(layer, output, active, heads)
            if gain is not None:
                output = output * gain if output.requires_grad else output.mul_(gain)
        return output

    def _prepare(self, call: Call) -> LayerPlan | None:
        tasks = list(self._tasks(call))
        output_gains = [
            (active, _heads(active, call))
            for active in self.actives
            if call.layer in active.heads and active.method.edits_heads
        ]
        if not tasks and not output_gains:
            if not any(call.layer in active.heads for active in self._finders):
                self._idle.add(call.layer)
            return None
        if tasks:
            check(call)
        plan = self._plan(call, tasks)
        replaces_all_rows = call.query.shape[2] == 1 and any(
            tasks[part.task].edits and tasks[part.task].heads is None and part.mask is None
            for _, parts in plan
            for part in parts
        )
        settled = _settled(call.layer, output_gains) is not None
        forward, entering = self.forward.on(call.query.device), self._entering.get(call.layer)
        kernels = self._kernels.of(call, tasks, forward, entering, settled)
        return LayerPlan(tasks, output_gains, plan, replaces_all_rows, kernels)

    def _by_kernels(
        self, call: Call, work: LayerPlan, entering: tuple[ActiveMethod, Tensor] | None
    ) -> Tensor | None:
        """The head outputs of the kernels; None where they cannot do this call."""
        kernels = work.kernels
        hidden = (
            entering[1] if entering is not None and kernels and kernels[0].sees_hidden else None
        )
        given = call.query, call.key, call.value, call.mask
        if not kernels or not all(kernel.fits(*given, hidden) for kernel in kernels):
            return None
        scaled = kernels[0].scaled
        gain = _settled(call.layer, work.output_gains) if scaled else None
        if scaled and gain is None:
            return None
        forward = self.forward.on(call.query.device)
        if entering is not None and hidden is not None:
            active: Any = entering[0]
            active.method.make_room(call.layer, forward, active.state)
        elif entering is not None:
            self._look_at(call.layer, entering)

        def by_kernels() -> Tensor:
            output = None if kernels[0].rows.picked is None else _packed(_writable(call))
            for kernel in kernels:
                output = kernel(call.layer, *given, forward, hidden, gain, output)
            assert output is not None
            return output

        def by_torch() -> Tensor:
            self._look_at(call.layer, entering)
            output = self._rows(call.without_tail(forward.image.shape[1]), work)
            return self._scaled(call.layer, output, work) if scaled else output

        if not work.trusted:
            work.trusted = dispatch.agree(kernels[0].kind, by_kernels, by_torch)
            if not work.trusted:
                work.kernels = []
                return None
            if work.alone:
                self._alone[call.layer] = work
        output = by_kernels()
        return output if scaled else self._scaled(call.layer, output, work)

    def _look_at(self, layer: int, entering: tuple[ActiveMethod, Tensor] | None) -> None:
        """Shows a method what `enter_block` left to the kernels."""
        if entering is not None:
            (active, hidden), forward = entering, self.forward
            forward = forward.on(hidden.device)
            active.method.observe_hidden(layer, hidden, forward, active.state)

    def _gain(
        self, layer: int, output: Tensor, active: ActiveMethod, heads: Tensor | None
    ) -> Tensor | None:
        """What a method multiplies head outputs by, `[B, 1, H, 1]`; made once, if it stays."""
        forward = self.forward.on(output.device)
        gain = active.method.edit_heads(layer, output, forward, active.state)
        if gain is None:
            return None
        known = self._gains.get((layer, active.method.name))
        if known is not None and known[0] is gain and known[1].dtype == output.dtype:
            return known[1]
        mine = gain if heads is None else torch.where(heads, gain, 1.0)
        mine = mine.to(output.dtype)[:, None, :, None]
        if gain is active.method.settled_gain(layer, active.state):
            self._gains[layer, active.method.name] = gain, mine
        return mine

    def _tasks(self, call: Call) -> Iterator[RowEdit]:
        layer, device = call.layer, call.query.device
        for active, edited in zip(self.actives, self._edited, strict=True):
            if edited is not None and layer in active.heads and active.method.edits_scores:
                yield RowEdit(active, Stage.SCORES, edited.to(device), _heads(active, call))
        for active, edited, watched in zip(self.actives, self._edited, self._watched, strict=True):
            if watched is not None and layer in watched[0]:
                yield RowEdit(active, Stage.WATCH, watched[1].to(device), None)
            if edited is not None and layer in active.heads and active.method.edits_weights:
                yield RowEdit(active, Stage.WEIGHTS, edited.to(device), _heads(active, call))

    def _plan(self, call: Call, tasks: list[RowEdit]) -> RowPlan:
        """The same for every layer of a device with the same tasks."""
        key = call.query.device, tuple(task.key for task in tasks)
        if key not in self._plans:
            batch, heads, _, _ = call.query.shape
            row_bytes = COPIES * 4 * batch * heads * call.key.shape[2]
            self._plans[key] = chunks(tasks, max(1, WEIGHTS_BUDGET // row_bytes))
        return self._plans[key]

    def _rows(self, call: Call, work: LayerPlan) -> Tensor:
        """The head outputs `[B, S, H, Dv]`: stock, with the edited rows in their place."""
        output: Tensor | None = None
        for rows, parts in work.plan:
            weights = self._weights(call, rows, parts, work.tasks)
            if work.replaces_all_rows:
                return call.output(weights)
            edits = [(p, work.tasks[p.task].heads) for p in parts if work.tasks[p.task].edits]
            if not edits:
                continue
            output = _writable(call) if output is None else output
            new = call.output(weights).to(output.dtype)
            if not any(p.index is None and p.mask is None and on is None for p, on in edits):
                keep = written(edits, new.shape[:3], new.device)
                new = torch.where(keep[..., None], new, output[:, rows])
            output[:, rows] = new
        return call.stock()[0] if output is None else output

    def _shown(self, stock: Tensor | None, call: Call, work: LayerPlan) -> Tensor | None:
        """The stock weights `[B, H, S, K]` with the edited rows in their place."""
        if stock is None:
            return None
        shown, keys = stock.clone(), call.key.shape[2]
        for rows, parts in work.plan:
            edits = [part for part in parts if work.tasks[part.task].edits]
            weights = self._weights(call, rows, edits, work.tasks)
            places = [(part, work.tasks[part.task].heads) for part in edits]
            shape = torch.Size((len(weights), len(rows), weights.shape[1]))
            keep = written(places, shape, weights.device).transpose(1, 2)[..., None]
            before = shown[:, :, rows, :keys]
            shown[:, :, rows, :keys] = torch.where(keep, weights.to(shown.dtype), before)
        return shown

    def _weights(
        self, call: Call, rows: Tensor, parts: list[RowChunk], tasks: list[RowEdit]
    ) -> Tensor:
        """The weights `[B, H, R, K]` of a chunk: all edits of scores, one softmax, then the rest in
        order.
        """
        early = [part for part in parts if tasks[part.task].stage is Stage.SCORES]
        weights = softmax(self._scores(call, rows, early, tasks)) if early else call.weights(rows)
        for part in parts[len(early) :]:
            weights = self._apply(call.layer, weights, rows, part, tasks[part.task])
        return weights

    def _scores(
        self, call: Call, rows: Tensor, parts: list[RowChunk], tasks: list[RowEdit]
    ) -> Tensor:
        """The edited scores of a chunk; what a row must not look at stays out of its sight."""
        scores, unseen = call.scores(rows), call.unseen(rows)
        for part in parts:
            new = self._apply(call.layer, scores, rows, part, tasks[part.task])
            scores = new if unseen is None else torch.where(unseen, scores, new)
        return scores

    def _apply(
        self, layer: int, before: Tensor, rows: Tensor, part: RowChunk, task: RowEdit
    ) -> Tensor:
        """Scores or weights `[B, H, R, K]` of a chunk behind what a task does to them."""
        mine = before if part.index is None else before[:, :, part.index]
        method, state = task.active.method, task.active.state
        forward = self.forward.on(before.device)
        forward.rows = rows if part.index is None else rows[part.index]
        if task.stage is Stage.WATCH:
            method.observe(layer, mine, forward.rows, forward, state)
            return before
        edit = method.edit_scores if task.stage is Stage.SCORES else method.edit_weights
        new = edit(layer, mine, forward, state)
        if part.mask is not None:
            new = torch.where(part.mask[:, None, :, None], new, mine)
        if task.heads is not None:
            new = torch.where(task.heads[:, None, None], new, mine)
        return new if part.index is None else before.index_copy(2, part.index, new)


def _heads(active: ActiveMethod, call: Call) -> Tensor | None:
    """The heads of a layer that are on, where it computes; None for all of them."""
    heads = active.heads[call.layer]
    return None if heads is None else heads.to(call.query.device)


def _finds_groups(method: Method) -> bool:
    return isinstance(method, KeyReweighting) and finds_groups(method)


def _settled(layer: int, gains: list[tuple[ActiveMethod, Tensor | None]]) -> Tensor | None:
    """The gain `[B, H]` of the head outputs, if one method alone has one, for all heads, and knows
    it before them.
    """
    if len(gains) != 1 or gains[0][1] is not None:
        return None
    active = gains[0][0]
    gain = active.method.settled_gain(layer, active.state)
    return gain if gain is not None and gain.dtype == torch.float32 else None


def _packed(output: Tensor) -> Tensor:
    """Head outputs whose heads lie next to each other, as the kernels write them."""
    packed = output.stride(3) == 1 and output.stride(2) == output.shape[3]
    return output if packed else output.contiguous()


def _writable(call: Call) -> Tensor:
    """The stock output; a copy where autograd still needs the original."""
    output, _ = call.stock()
    return output.clone() if output.requires_grad else output
