"""The machine that figures hold for."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eval.runs.config import Config
from eval.runs.provenance import environment


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    on_cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if on_cuda else _processor()
    return {
        "processor": processor,
        **({"triton": _triton()} if on_cuda else {"threads": torch.get_num_threads()}),
        "system": f"{platform.system()} {platform.machine()}",
        **environment(Config(device=str(device))),
    }


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The name of the processor, where the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    if sys.platform == "linux" and cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
