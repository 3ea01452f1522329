"""What holds for every test."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models this small run faster on one core, and tests share the machine."""
    torch.set_num_threads(1)
