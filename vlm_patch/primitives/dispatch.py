"""Whether Triton kernels can be used, and whether they can be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cuda",)
TOLERANCE = 0.02
"""Largest difference to plain torch, as a share of its largest value, that rounding makes."""

_verdicts: dict[Hashable, bool] = {}


def possible(device: str) -> bool:
    """Whether the kernels can run now on this type of device; they know no gradients."""
    if device not in DEVICES or torch.compiler.is_dynamo_compiling():
        return False  # the compiler fuses what defines them
    return not torch.is_grad_enabled() and kernels() is not None


@lru_cache
def kernels() -> Any:
    """The module of the kernels, or None without Triton."""
    try:
        from vlm_patch.primitives import kernels
    except ImportError:
        warnings.warn(
            "Triton is not installed: generated tokens take more launches than they need. "
            "pip install triton",
            stacklevel=2,
        )
        return None
    return kernels


def tried(kind: Hashable, launch: Callable[[], Tensor], twin: Callable[[], Tensor]) -> Tensor:
    """`launch()`, if it has agreed with `twin()` on the first call of this kind; else `twin()`.

    A card or a Triton on which a kernel fails costs speed and a warning, never a wrong answer.
    """
    if kind not in _verdicts:
        _verdicts[kind] = _agree(kind, launch, twin())
    return launch() if _verdicts[kind] else twin()


def _agree(kind: Hashable, launch: Callable[[], Tensor], exact: Tensor) -> bool:
    try:
        apart = float((launch().float() - exact.float()).abs().max())
        if apart <= TOLERANCE * float(exact.abs().max()):
            return True
        reason = f"it is {apart:g} apart from plain torch"
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"A fused kernel is left out for {kind} ({reason}); plain torch takes its place, which is "
        "right and slower.",
        stacklevel=4,
    )
    return False


def power_of_2(size: int) -> int:
    """The least one that is not below `size`; the sizes that Triton knows."""
    return 1 << (size - 1).bit_length()
