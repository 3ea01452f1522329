"""Tensor parallelism: every process computes some heads of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """The heads of this process: part `rank` of `ranks` equal ones, in the order of the heads.

    group: the processes that hold the others.
    """

    rank: int = 0
    ranks: int = 1
    group: Any = None

    def mine(self, heads: Tensor, dim: int) -> Tensor:
        """Of a tensor with all heads along `dim`, those of this process."""
        return heads if self.ranks == 1 else heads.chunk(self.ranks, dim)[self.rank]

    def gather(self, mine: Tensor, dim: int) -> Tensor:
        """All heads along `dim`, put together from all processes, which must all come here."""
        if self.ranks == 1:
            return mine
        from torch.distributed.nn.functional import all_gather  # absent where torch is built so

        parts = all_gather(mine.contiguous(), self.group)  # type: ignore[no-untyped-call]
        return torch.cat(parts, dim)


WHOLE = Shard()


def shard_of(model: Any, attention: nn.Module) -> Shard:
    """The part of a model's heads that its `attention` computes in this process."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return WHOLE
    if "tp" in (mesh.mesh_dim_names or ()):
        mesh = mesh["tp"]
    if mesh.ndim != 1 or mesh.size() == 1 or not _split(attention):
        return WHOLE
    return Shard(mesh.get_local_rank(), mesh.size(), mesh.get_group())


def _split(attention: nn.Module) -> bool:
    """Whether the weights of an attention lie in several processes: as distributed tensors, or in
    some versions of transformers as plain parts, in modules that it marks.
    """
    placed = (getattr(weight, "placements", ()) for weight in attention.parameters())
    marks = (getattr(module, "_hf_tp_plan", None) for module in attention.modules())
    return "colwise" in marks or any(place.is_shard() for places in placed for place in places)
