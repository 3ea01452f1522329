"""Whether Triton kernels can be used, and whether they can be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor

from vlm_patch.primitives.triton import INSTALLED

DEVICES = ("cuda",)
TOLERANCE = 0.02
"""Largest difference to plain torch, as a share of its largest value, that rounding makes."""
UNDECIDED = 0.01
"""Largest share of vectors that may differ by more."""

_verdicts: dict[Hashable, bool] = {}


def possible(device: str) -> bool:
    """Whether the kernels can run now on this type of device; they know no gradients."""
    if device not in DEVICES or torch.compiler.is_dynamo_compiling():
        return False  # the compiler fuses what defines them
    return not torch.is_grad_enabled() and installed()


@lru_cache
def installed() -> bool:
    """Whether Triton is there; a warning if it is not."""
    if not INSTALLED:
        warnings.warn(
            "Triton is not installed: generated tokens take more launches than they need. "
            "pip install triton",
            stacklevel=2,
        )
    return INSTALLED


def tried(kind: Hashable, launch: Callable[[], Tensor], twin: Callable[[], Tensor]) -> Tensor:
    """`launch()`, if it has agreed with `twin()` on the first call of this kind; else `twin()`.

    A card or a Triton on which a kernel fails costs speed and a warning, never a wrong answer.
    """
    return launch() if agree(kind, launch, twin) else twin()


def agree(kind: Hashable, launch: Callable[[], Tensor], twin: Callable[[], Tensor]) -> bool:
    """Whether `launch()` agreed with `twin()` on the first call of this kind."""
    if kind not in _verdicts:
        _verdicts[kind] = _agree(kind, launch, twin().clone())
    return _verdicts[kind]


def _agree(kind: Hashable, launch: Callable[[], Tensor], exact: Tensor) -> bool:
    try:
        apart = (launch().float() - exact.float()).abs()
        close = (apart <= TOLERANCE * exact.abs().max()).all(-1)
        # where a number lies next to a threshold, rounding decides: now and then in a row
        if float((~close).float().mean()) <= UNDECIDED:
            return True
        reason = f"it is {float(apart.max()):g} apart from plain torch"
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"A fused kernel is left out for {kind} ({reason}); plain torch takes its place, which is "
        "right and slower.",
        stacklevel=4,
    )
    return False
