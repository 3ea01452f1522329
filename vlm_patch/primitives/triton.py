"""Triton where it is installed; where it is not, functions written for it stay plain Python that
nobody calls.
"""

from __future__ import annotations

import importlib.util
from typing import Any

INSTALLED = importlib.util.find_spec("triton") is not None

if INSTALLED:
    from triton import language as tl
else:
    tl: Any = None  # type: ignore[no-redef]

__all__ = ["INSTALLED", "jit", "power_of_2", "tl"]


def jit(function: Any) -> Any:
    """`triton.jit`, where there is one."""
    if not INSTALLED:
        return function
    import triton

    return triton.jit(function)


def power_of_2(size: int) -> int:
    """The least power of two that is not below `size`; the block sizes that Triton knows."""
    return 1 << max(0, size - 1).bit_length()
