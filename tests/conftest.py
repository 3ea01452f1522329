"""What holds for every test."""

import os

import pytest
import torch

# read when Triton is first imported; the kernels' tests run on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models this small run faster on one core, and tests share the machine."""
    torch.set_num_threads(1)
