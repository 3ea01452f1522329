"""`make test-gpu`: what a card is asked, in one go. VLM_PATCH_DEVICE=cpu tries the checks without.

TF32 is off, so that float32 is float32.
"""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("VLM_PATCH_DEVICE", "cuda"))
MISSING = (
    f"make test-gpu: no CUDA device was found (torch {torch.__version__}, built for CUDA "
    f"{torch.version.cuda}). Run it on a machine with a card; VLM_PATCH_DEVICE=cpu tries the "
    "checks themselves on the CPU, without the kernels"
)
NO_CARD = 3

apart: dict[str, float] = {}
"""How far what was compared lay apart, by name; printed at the end."""


def pytest_sessionstart() -> None:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.exit(MISSING, returncode=NO_CARD)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def pytest_report_header() -> str:
    on_card = DEVICE.type == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name(DEVICE) if on_card else "no card"
    return f"device: {DEVICE} ({name}), torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"largest differences on {DEVICE}")
    for name, value in apart.items():
        terminalreporter.write_line(f"{name}: {value:.1e}")
