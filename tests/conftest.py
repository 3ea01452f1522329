"""What holds for every test."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "suite",
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=SLOW,
)
settings.register_profile("long", max_examples=5000, deadline=None, suppress_health_check=SLOW)
settings.load_profile("suite")

# read where Triton compiles; the kernels' tests run on the CPU, but for those that need a card
if not any("tests/gpu" in argument for argument in sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")

FAMILIES = (
    "eval/support/test_families.py",
    "primitives/test_planted_sinks.py",
    "models/test_family_facts.py",
    "models/test_special_models.py",
)
"""They need families, or image features, that older versions of transformers do not have."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    from eval.support import tiny  # after the line for Triton

    left_out = collection_path.as_posix().endswith(tuple(f"tests/{name}" for name in FAMILIES))
    return True if left_out and not tiny.FEATURES else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from transformers import __version__

    from eval.support import tiny

    if not tiny.FEATURES:
        names = ", ".join(FAMILIES)
        terminalreporter.write_line(f"left out with transformers {__version__}: {names}")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models this small run faster on one core, and tests share the machine."""
    torch.set_num_threads(1)
