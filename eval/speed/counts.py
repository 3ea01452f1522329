"""What one call asks of the device: kernels it launches, values the host waits for.

On CUDA both are read from the device. On the CPU, where no kernel is launched, operators of torch
are counted: on a GPU each would be a launch or more, but for those that only make a view.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ASKING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, views apart, and those whose result or size depends on values on the
    device, for which the host would wait.
    """

    count: int = 0
    waits: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = args[1] if func in BY_INDEX else ()
        boolean = any(place is not None and place.dtype == torch.bool for place in places)
        self.waits += func in ASKING or boolean
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[], object]) -> Operators:
    """What `run` dispatches."""
    with (seen := Operators()):  # type: ignore[no-untyped-call]
        run()
    return seen


def launches(run: Callable[[], object], device: torch.device) -> int:
    """The kernels, copies and fills that `run` starts on a card; on the CPU its operators."""
    if device.type != "cuda":
        return operators(run).count
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize(device)
    events: Any = seen.events()
    return sum("CUDA" in str(event.device_type) and "Sync" not in event.name for event in events)


def waits(run: Callable[[], object], device: torch.device) -> int:
    """How often `run` makes the host wait for the device."""
    if device.type != "cuda":
        return operators(run).waits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)
