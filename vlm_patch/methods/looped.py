"""Steps of VAR and GIFT at a generated token as one compiled loop each, on a CPU.

What they compute is defined by `reweigh` with the shares of `var.py` and `gift.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_patch import cpu


def sink_column(hidden: Tensor, dims: Tensor, tau: float, groups: Tensor, place: int) -> None:
    """Writes VAR's key group of a new token into `groups` `[B, 4, K]` at `place`, from the stream
    entering a block `[B, 1, D]`.
    """
    cpu.loops().sink_column(hidden.numpy(), dims.numpy(), tau, groups.numpy(), place)


def sink_row(
    weights: Tensor,
    groups: Tensor,
    move_fraction: float,
    rho_nonsink: float,
    min_image_mass: float,
) -> Tensor:
    """VAR's edit of weights `[B, H, 1, K]` by key groups `[B, 4, K]`, in the paper's semantics."""
    return _edited(
        cpu.loops().sink_row, weights, groups, move_fraction, rho_nonsink, min_image_mass
    )


def gaze_row(weights: Tensor, groups: Tensor, beta: float, count: int) -> Tensor:
    """GIFT's edit of weights `[B, H, 1, K]` by key groups `[B, 4, K]`; `count` heads are chosen."""
    return _edited(cpu.loops().gaze_row, weights, groups, beta, count)


def _edited(loop: Any, weights: Tensor, groups: Tensor, *numbers: Any) -> Tensor:
    edited = torch.empty_like(weights)
    loop(weights.numpy(), groups.numpy(), *numbers, edited.numpy())
    return edited
