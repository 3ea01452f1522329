"""Whether the loops compiled by Numba can be used."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MOST = 2**16
"""Numbers from which on torch, with all threads, is as fast as one loop."""


def serves(tensor: Tensor) -> bool:
    """Whether the loops can take this tensor now; they know float32, rows without gaps and
    no gradients.
    """
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and tensor.numel() < MOST
        and tensor.is_contiguous()
        and not (tensor.requires_grad or torch.is_grad_enabled())
        and loops() is not None
    )


@lru_cache
def loops() -> Any:
    """The module of the loops; None without Numba, or with one that does not work here."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from vlm_patch import loops
    except Exception as error:  # whatever a compiler raises, or an import of one that does not fit
        warnings.warn(
            f"Numba is installed but not used ({type(error).__name__}: {error}); plain torch takes "
            "its place, which is right and slower on small models. Where it finds no place for its "
            "cache, set NUMBA_CACHE_DIR to a folder that can be written.",
            stacklevel=2,
        )
        return None
    return loops
