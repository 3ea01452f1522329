"""Launching Triton kernels: the first time through Triton's JIT, then past it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

KNOWN = ((3, 6), (3, 9))
"""The versions of Triton, first and last, whose compiled kernels are called directly."""
ALIGNED = 0x7FFFFFF0
"""The bits of addresses and strides that are multiples of 16 and of 32 bits."""


class Launch:
    """A kernel with its constants, and options of the compiler (num_warps, num_stages).

    The host's time is what a small kernel costs, and most of it is the JIT looking at every
    argument. Once a kernel was compiled for aligned tensors, aligned ones go straight to it;
    others, and versions of Triton that are not known, go through the JIT.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: int) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self.values = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.bound: Any = None

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor | None],
        integers: tuple[int, ...],
        strides: tuple[int, ...],
        floats: tuple[float, ...] = (),
        aligned: int = 4,
        kept: Kept | None = None,
    ) -> None:
        """Arguments in the kernel's order. strides, and the first `aligned` tensors, are those
        whose alignment it was compiled for. kept: more tensors, behind the others.
        """
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        low = reduce(or_, pointers[:aligned]) & 15 | reduce(or_, strides)
        straight = not low & ~ALIGNED and reduce(or_, integers, 0) < 2**31
        if straight and self.bound is not None:
            device, run, function, packed = self.bound
            if torch.cuda.current_device() == device:
                more = () if kept is None else kept.pointers
                stream = torch._C._cuda_getCurrentRawStream(device)
                numbers = (*integers, *strides, *floats, *self.values)
                run(*grid, stream, function, packed, None, None, None, *pointers, *more, *numbers)
                return
        given = [*tensors, *(() if kept is None else kept.tensors)]
        bytes_ = [
            t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in given
        ]
        first: Any = tensors[0]
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            compiled = self.kernel[grid](
                *bytes_, *integers, *strides, *floats, **self.constants, **self.options
            )
        if straight and self.bound is None and first.is_cuda:
            self.bound = _bound(compiled, first.get_device())


class Kept:
    """Tensors that are given to a kernel again and again, with their addresses."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = tensors
        self.pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _bound(compiled: Any, device: int) -> Any:
    """What a compiled kernel is called by, where this is known; nothing in the interpreter."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    names = ("run", "function", "packed_metadata")
    if not KNOWN[0] <= version <= KNOWN[1] or not all(hasattr(compiled, n) for n in names):
        return None
    return device, *(getattr(compiled, name) for name in names)


_launches: dict[Hashable, Launch] = {}
_scratch: dict[Hashable, tuple[Tensor, Tensor]] = {}


def launch(kernel: Any, kind: Hashable, constants: dict[str, Any], **options: int) -> Launch:
    """The launch of a kernel with these constants, made once; kind: what else it is compiled for,
    the types and the device of its tensors.
    """
    key = kernel, kind, *constants.items()
    if key not in _launches:
        _launches[key] = Launch(kernel, constants, **options)
    return _launches[key]


def scratch(device: torch.device, numbers: int, counters: int) -> tuple[Tensor, Tensor]:
    """Memory that kernels of one stream share one after the other: so many float32 numbers, and
    counters, which are 0 and which whoever uses them leaves at 0.
    """
    index: Any = device.index
    stream = torch._C._cuda_getCurrentRawStream(index) if device.type == "cuda" else 0
    kept = _scratch.get((device, stream))
    if kept is None or kept[0].numel() < numbers or kept[1].numel() < counters:
        kept = (
            torch.empty(max(numbers, 2**16), device=device),
            torch.zeros(max(counters, 1024), dtype=torch.int32, device=device),
        )
        _scratch[device, stream] = kept
    return kept


def processors(device: torch.device) -> int:
    """How many programs a device runs at once."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
