"""The clock of the measurements, and the seconds that are left."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


def now(device: torch.device) -> float:
    """The clock, once the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class Budget:
    """Seconds for what was planned, less for all that comes where something took longer.

    planned: seconds of everything that is still to come. end: on the clock; infinite without one.
    """

    planned: float
    end: float = float("inf")

    def take(self, seconds: float) -> float:
        """What is left for something that was planned to take `seconds`."""
        left = max(0.0, self.end - time.perf_counter())
        share = min(1.0, left / self.planned) if self.planned > 0 else 1.0
        self.planned -= seconds
        return share * seconds
