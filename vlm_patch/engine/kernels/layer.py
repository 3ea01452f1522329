"""One layer of a generation whose edited rows run as Triton kernels.

In place of the stock kernel for the row of a generated token, behind it for rows of a prompt.
`Call.weights`, `KeyReweighting.edit_weights` and `Call.output` define what results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlm_patch.engine.attention import Call
from vlm_patch.method import ForwardContext
from vlm_patch.primitives import dispatch
from vlm_patch.primitives.launch import Kept, Launch, launch, processors, scratch
from vlm_patch.primitives.reweighting import Formula, KeyReweighting, NewKeyGroups
from vlm_patch.primitives.triton import power_of_2

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = 4
LARGEST_TILE = 64
NO_NUMBERS = (0.0, 0.0, 0.0)


@dataclass
class Edit:
    """A method in one layer, and the heads `[H]` (bool) that are on, None for all."""

    method: KeyReweighting
    state: Any
    on: Tensor | None


@dataclass
class Rows:
    """Rows `first` to `first + count` of a forward. picked `[B, S]` (bool): those that are edited,
    the rest stays stock; None: all, and nothing stock is needed.
    """

    first: int = 0
    count: int = 1
    picked: Tensor | None = None


def serves(call: Call) -> bool:
    """Whether the kernels can read this call's tensors now."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    return (
        query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and (
            mask is None
            or (mask.dtype == torch.bool and mask.shape[1] == 1 and mask.stride(3) == 1)
        )
        and dispatch.possible(query.device.type)
    )


def splits(keys: int, units: int, block: int, device: torch.device) -> int:
    """How many programs share the keys of one unit of work, a power of two."""
    waves = 1 if keys < 1024 else 2
    most = min(8, waves * processors(device) // units, -(-keys // (2 * block)))
    return 1 << (max(1, most).bit_length() - 1)


def finds_groups(method: KeyReweighting) -> bool:
    """Whether kernels can find the groups of new keys in place of `observe_hidden`."""
    known = method.written_for_triton("observe_hidden", "new_key_groups")
    return known and method.new_key_groups() is not None


class LayerKernel:
    """Everything about edited rows that stays the same while tokens are generated, for all layers
    with the same shapes and methods.

    edits: one method, or two in the order given. hidden: the stream entering the block, where the
    groups of the new key are found from it. scaled: the head outputs are multiplied by a gain.
    """

    def __init__(
        self,
        call: Call,
        edits: Sequence[Edit],
        rows: Rows,
        hidden: Tensor | None = None,
        scaled: bool = False,
    ) -> None:
        query, device = call.query, call.query.device
        self.edits, self.rows, self.scaled = edits, rows, scaled
        self.batch, self.heads, self.new, self.size = query.shape
        self.shape = query.shape
        self.kv, self.width = call.key.shape[1], call.value.shape[3]
        self.masked, self.sees_hidden = call.mask is not None, hidden is not None
        self.lines = GROUPS ** len(edits)
        lines = self.lines * rows.count * (self.heads // self.kv)
        exact = query.dtype == torch.float32
        self.tile = min(LARGEST_TILE // (1 + exact), max(16, power_of_2(lines)))
        self.tiles = -(-lines // self.tile)
        self.block = 32 if exact or max(self.size, self.width) > 128 else 64
        units = self.batch * self.kv * self.tiles
        self.splits = splits(call.key.shape[2], units, self.block, device)
        self.part = self.tile * (max(16, power_of_2(self.width)) + 2)
        self.room = units * self.splits * self.part, units
        self.on = [None if edit.on is None else edit.on.to(device) for edit in edits]
        self.formulas: list[Any] = [_formula(edit.method, self.heads) for edit in edits]
        self.known = None not in self.formulas
        self.local = self.known and len(edits) == 1 and not edits[0].method.compares_heads
        self.numbers = [NO_NUMBERS if f is None else f.numbers for f in self.formulas]
        self.slot = 0
        self.column: Any = None
        self.indices: Tensor | None = None
        self.partial = query.new_empty(0)
        if hidden is not None:
            self.slot = next(i for i, edit in enumerate(edits) if finds_groups(edit.method))
            self.column = edits[self.slot].method.new_key_groups()
            self.indices = indices(self.column, device)
        self.count = 0 if self.indices is None else len(self.indices)
        self.compiled_for = device, query.dtype, None if hidden is None else hidden.dtype
        names = "+".join(edit.method.name for edit in edits)
        where = "rows" if rows.picked is not None else "row"
        self.kind = (f"{where} of {names}", str(device), query.dtype, *query.shape[1::2])
        self.kind += (self.kv, self.width, self.masked, self.sees_hidden)
        self.attend = self._attend(call, hidden)
        self.finish = None if self.local else self._finish()

    def fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        hidden: Tensor | None,
    ) -> bool:
        """Whether a later call is of the kind that this object was made for."""
        return (
            query.shape == self.shape
            and (mask is not None) == self.masked
            and (hidden is not None) == self.sees_hidden
            and query.stride(3) == key.stride(3) == value.stride(3) == 1
            and not torch.is_grad_enabled()
        )

    def _shape(self) -> dict[str, Any]:
        return {
            **{"LINES": self.lines, "KV": self.kv, "SHARED": self.heads // self.kv},
            **{"V": self.width, "VW": max(16, power_of_2(self.width)), "M": self.tile},
            **{"SPLITS": self.splits, "PICKED": self.rows.picked is not None},
        }

    def _attend(self, call: Call, hidden: Tensor | None) -> Launch:
        from vlm_patch.engine.kernels import attend

        softcap, wide = call.options.get("softcap"), max(16, power_of_2(self.size))
        number = getattr(self.column, "number", 0.0)
        self.floats = call.scaling, float(softcap or 0.0), float(number), *self.numbers[0]
        self.floats_to_finish = *self.numbers[0], *self.numbers[-1]
        exact, shape = call.query.dtype == torch.float32, self._shape()
        constants = {
            **shape,
            "FORMULA": self.formulas[0].function if self.local else None,
            "COLUMN": None if self.column is None else self.column.function,
            "SLOT": self.slot,
            **{"D": self.size, "DW": wide, "N": self.block},
            "MASKED": self.masked,
            "CAUSAL": call.causal and not self.masked,
            "CAPPED": softcap is not None,
            "SWITCHED": self.local and self.on[0] is not None,
            "GAIN": self.local and self.scaled,
            "WIDTH": 1 if hidden is None else power_of_2(hidden.shape[-1]),
            "COUNT": 1 if self.column is None else power_of_2(len(self.column.indices)),
            "PRECISION": "ieee" if exact else "tf32",
            "WIDE": call.query.device.type == "cpu",
        }
        # registers: a full tile fits into those of 4 warps only without masks and grouped heads
        large = self.tile > 32 and (exact or self.masked or wide > 128 or self.heads > self.kv)
        large |= exact and self.tile > 16
        stages = 2 if exact or wide > 128 else 3
        warps = 8 if large else 4
        return launch(
            attend.attend, self.compiled_for, constants, num_warps=warps, num_stages=stages
        )

    def _finish(self) -> Launch:
        from vlm_patch.engine.kernels import attend

        functions = [None if f is None or not self.known else f.function for f in self.formulas]
        constants = {
            **self._shape(),
            "FORMULA": functions[0],
            "SECOND": functions[-1],
            **{"HEADS": self.heads, "HW": power_of_2(self.heads)},
            "SWITCHED": self.on[0] is not None,
            "SWITCHED_MORE": len(self.on) > 1 and self.on[1] is not None,
            "GAIN": self.scaled,
        }
        return launch(attend.finish, self.compiled_for[:2], constants, num_warps=2)

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        forward: ForwardContext,
        hidden: Tensor | None = None,
        gain: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        """The head outputs `[B, S, H, Dv]` with the edited rows written.

        hidden `[B, 1, D]`, gain `[B, H]` (float32): where this object was made for them. output:
        the stock one, where rows are picked.
        """
        if output is None:
            output = query.new_empty(self.batch, self.new, self.heads, self.width)
        total = forward.image.shape[1]
        keys = min(total, key.shape[2])  # without the unused rest of a static cache
        tables, rows = self.tables(layer, forward, query.device), self.rows
        first, last = tables[0], tables[-1]
        partial, arrived = scratch(query.device, *self.room)
        if self.partial is not partial:
            self._keep(partial, arrived)
        q, k, v, o = query.stride(), key.stride(), value.stride(), output.stride()
        seen = (0, 0, 0) if mask is None else mask.stride()
        picked, stream = rows.picked, () if hidden is None else (hidden.shape[2], hidden.stride(0))
        self.attend(
            (self.tiles * self.splits, self.kv, self.batch),
            (query, key, value, output, first, last, mask, gain, hidden),
            (
                *(keys, self.new, rows.first, rows.count),
                -(-keys // (self.splits * self.block)) * self.block,
                *(total - keys, first.stride(1), last.stride(1)),
                0 if mask is None or mask.shape[0] == 1 else seen[0],
                0 if mask is None or mask.shape[2] == 1 else seen[2],
                0 if picked is None else picked.stride(0),
                self.count,
                *(stream or (0, 0)),
            ),
            (q[0], q[1], q[2], k[0], k[1], k[2], v[0], v[1], v[2], o[0], o[1]),
            self.floats,
            kept=self.kept,
        )
        if self.finish is not None:
            self._finish_rows(output, forward, tables, gain)
        return output

    def _keep(self, partial: Tensor, arrived: Tensor) -> None:
        picked, on = self.rows.picked, self.on
        self.partial = partial
        self.kept = Kept(picked, on[0], self.indices, partial, arrived)
        self.kept_to_finish = Kept(picked, on[0], on[-1], partial)

    def tables(self, layer: int, forward: ForwardContext, device: torch.device) -> list[Tensor]:
        """The groups `[B, 4, >= K]` of each method; they may move from token to token."""
        found = []
        for edit in self.edits:
            table = edit.method.groups(layer, forward, edit.state)
            found.append(_readable(table if table.device == device else table.to(device)))
        return found

    def _finish_rows(
        self,
        output: Tensor,
        forward: ForwardContext,
        tables: list[Tensor],
        gain: Tensor | None,
    ) -> None:
        rows, finish = self.rows, self.finish
        assert finish is not None
        torch_works_them_out = not self.known or any(
            edit.method.compares_ranks(forward) for edit in self.edits
        )
        finish(
            (rows.count, self.heads, self.batch),
            (output, gain, self._given(forward, tables) if torch_works_them_out else None),
            (rows.first, self.tiles, 0 if rows.picked is None else rows.picked.stride(0)),
            output.stride()[:2],
            self.floats_to_finish,
            aligned=1,
            kept=self.kept_to_finish,
        )

    def masses(self) -> Tensor:
        """The masses `[B, LINES, H, R]` of what `attend` left."""
        shape = (self.batch, self.kv, self.tiles, self.splits, self.part)
        stats = self.partial[: self.room[0]].view(shape)[..., -2 * self.tile :]
        peaks, sums = stats[..., : self.tile], stats[..., self.tile :]
        best = peaks.amax(3)
        sums = (sums * (peaks - best[:, :, :, None]).exp()).sum(3)
        shape = (self.batch, self.kv, self.rows.count, self.heads // self.kv, self.lines)
        used = self.rows.count * shape[3] * self.lines
        best, sums = (part.flatten(2)[:, :, :used].view(shape) for part in (best, sums))
        sums = sums * (best - best[..., -1:]).exp()
        masses: Tensor = sums / sums[..., -1:]
        return masses.permute(0, 4, 1, 3, 2).flatten(2, 3)

    def _given(self, forward: ForwardContext, tables: list[Tensor]) -> Tensor:
        """The coefficients `[B, R, H, LINES]` of the lines, worked out by torch."""
        total, masses = forward.image.shape[1], self.masses()
        shares = masses.new_ones(self.batch, 1, *masses.shape[2:])
        for place, (edit, table) in enumerate(zip(self.edits, tables, strict=True)):
            grid = masses
            if len(self.edits) == 2:
                grid = masses.view(self.batch, GROUPS, GROUPS, *masses.shape[2:])
                grid = grid[:, :, -1] if place == 0 else (shares[:, :, None] * grid).sum(1)
            found = edit.method.all_shares(grid, table.narrow(-1, 0, total), forward)
            if edit.on is not None:
                unedited = torch.zeros_like(found)
                unedited[:, -1] = 1
                found = torch.where(edit.on.to(found.device)[:, None], found, unedited)
            shares = (shares[:, :, None] * found[:, None]).flatten(1, 2)
        return shares.permute(0, 3, 2, 1).contiguous()


def _readable(table: Tensor) -> Tensor:
    """Groups in the layout and type that the kernels read."""
    sample, group, key = table.stride()
    fine = key == 1 and sample == GROUPS * group and table.dtype == torch.float32
    return table if fine else table.float().contiguous()


def _formula(method: KeyReweighting, heads: int) -> Formula | None:
    known = method.written_for_triton("shares", "formula")
    return method.formula(heads) if known else None


@lru_cache
def _indices(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def indices(column: NewKeyGroups, device: torch.device) -> Tensor:
    """The indices of new key groups on a device, `[N]`."""
    return _indices(column.indices, device)


def write_groups(
    method: KeyReweighting, layer: int, hidden: Tensor, forward: ForwardContext, state: Any
) -> None:
    """Finds the groups of all new keys from the stream `[B, S, D]` entering a block, and writes
    them behind those of the cached ones.
    """
    from vlm_patch.engine.kernels import attend

    column = method.new_key_groups()
    assert column is not None
    method.make_room(layer, forward, state)
    table, image = method.groups(layer, forward, state), forward.image[:, forward.new]
    dims, size = indices(column, hidden.device), hidden.shape[2]
    constants = {
        "COLUMN": column.function,
        **{"WIDTH": power_of_2(size), "COUNT": power_of_2(len(column.indices))},
    }
    launch(attend.columns, (hidden.device, hidden.dtype), constants, num_warps=8)(
        (hidden.shape[1], hidden.shape[0], 1),
        (hidden, image, table, dims),
        (forward.position.past, len(column.indices), *image.stride(), table.stride(1)),
        (size, *hidden.stride()[:2]),
        (column.number,),
        aligned=1,
    )
