"""`make test-gpu`: what a card is asked, in one go. VLM_PATCH_DEVICE=cpu tries the checks without.

TF32 is off, so that float32 is float32. With pytest-xdist the workers share the card.
"""

import os
from typing import Any

import pytest
import torch

DEVICE = torch.device(os.environ.get("VLM_PATCH_DEVICE", "cuda"))
if DEVICE.type == "cuda":  # where a shell exports it for the rest of the tests; Triton comes later
    os.environ["TRITON_INTERPRET"] = "0"
MISSING = (
    f"make test-gpu: no CUDA device was found (torch {torch.__version__}, built for CUDA "
    f"{torch.version.cuda}). Run it on a machine with a card; VLM_PATCH_DEVICE=cpu tries the "
    "checks themselves on the CPU, without the kernels"
)
NO_CARD = 3

apart: dict[str, float] = {}
"""How far what was compared lay apart in the test that runs, by name."""
largest: dict[str, float] = {}
"""The largest of every name, printed at the end; known to the process that prints."""


def pytest_sessionstart() -> None:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.exit(MISSING, returncode=NO_CARD)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def pytest_report_header() -> str:
    on_card = DEVICE.type == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name(DEVICE) if on_card else "no card"
    return f"device: {DEVICE} ({name}), torch {torch.__version__}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Any:
    """The differences travel with the report of their test, out of a worker too."""
    report = yield
    if call.when == "call":
        report.user_properties += apart.items()
        apart.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties if report.when == "call" else ():
        largest[name] = max(value, largest.get(name, 0.0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"largest differences on {DEVICE}")
    for name, value in sorted(largest.items()):
        terminalreporter.write_line(f"{name}: {value:.1e}")
