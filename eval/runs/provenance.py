"""What a run was made with: versions, commit, device."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eval.runs import generate
from eval.runs.config import Config

PACKAGES = ("vlm-patch", "torch", "transformers", "accelerate", "tokenizers", "numpy", "pillow")


def environment(config: Config) -> dict[str, Any]:
    """Everything beside the settings that can change an answer."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": _device(config),
    }


def _device(config: Config) -> Any:
    """Where the model is put, with the name of the accelerator if that is one."""
    if config.device_map or config.tp_plan:
        return _plain(config.device_map or config.tp_plan)
    device = config.device or generate.best_device()
    return f"{device} ({torch.cuda.get_device_name(device)})" if "cuda" in device else device


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else dict(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with -dirty where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        completed = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True
        )
    except OSError:
        return None
    return completed.stdout.strip() or None
