"""What holds for every test."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import __version__

from tests import tiny

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "suite",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=SLOW,
)
settings.register_profile("long", max_examples=5000, deadline=None, suppress_health_check=SLOW)
settings.load_profile("suite")

# read when Triton is first imported; the kernels' tests run on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")

FAMILIES = ("test_families.py", "test_special_models.py", "eval/test_families.py")
"""They give their models image features."""
collect_ignore = [] if tiny.FEATURES else list(FAMILIES)


def pytest_report_header() -> str:
    left_out = (
        "" if tiny.FEATURES else f"; takes no image features, so left out: {', '.join(FAMILIES)}"
    )
    return f"transformers {__version__}{left_out}"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models this small run faster on one core, and tests share the machine."""
    torch.set_num_threads(1)
