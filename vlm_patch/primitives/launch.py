"""Steps of VAR and GIFT at a generated token as one kernel each, for a GPU that waits for launches.

What they compute is defined by the functions of the same names in `var.py` and `gift.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_patch.primitives import dispatch

BLOCK = 1024


def sink_column(hidden: Tensor, dims: Tensor, tau: float) -> Tensor:
    """VAR's key groups `[B, 4, 1]` of new tokens, from the stream entering a block `[B, 1, D]`."""
    batch, _, size = hidden.shape
    column = hidden.new_empty(batch, 4, 1, dtype=torch.float32)
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]
        dispatch.kernels().sink_column[(batch,)](
            *(hidden, dims, column, size, len(dims), tau, hidden.stride(0)),
            BLOCK=BLOCK,
            COUNT=dispatch.power_of_2(len(dims)),
        )
    return column


def sink_shares(
    masses: Tensor, move_fraction: float, rho_nonsink: float, min_image_mass: float
) -> Tensor:
    """VAR's shares `[B, 4, H, 1]` from group masses `[B, 4, H, 1]`, in the paper's semantics."""
    shares, heads = torch.empty_like(masses), masses.shape[2]
    with torch.cuda.device_of(masses):  # type: ignore[no-untyped-call]
        dispatch.kernels().sink_shares[(len(masses),)](
            *(masses, shares, heads, move_fraction, rho_nonsink, min_image_mass),
            HEADS=dispatch.power_of_2(heads),
        )
    return shares


def gaze_shares(masses: Tensor, beta: float, count: int) -> Tensor:
    """GIFT's shares `[B, 4, H, 1]` from group masses `[B, 4, H, 1]`; `count` heads are chosen."""
    shares, heads = torch.empty_like(masses), masses.shape[2]
    with torch.cuda.device_of(masses):  # type: ignore[no-untyped-call]
        dispatch.kernels().gaze_shares[(len(masses),)](
            *(masses, shares, heads, beta, count), HEADS=dispatch.power_of_2(heads)
        )
    return shares
