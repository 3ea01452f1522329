"""What holds for every test."""

import os
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

GPU = Path(__file__).parent / "gpu"
FAMILIES = (
    "eval/support/test_families.py",
    "primitives/test_planted_sinks.py",
    "models/test_family_facts.py",
    "models/test_special_models.py",
)
"""They need families, or image features, that older versions of transformers do not have."""


def pytest_configure(config: pytest.Config) -> None:
    """All but tests/gpu runs on the CPU, on a machine with a card too: kernels in Triton's
    interpreter. Both variables are read later, by Triton's import and by CUDA's first use.
    """
    paths = [config.invocation_params.dir / arg.partition("::")[0] for arg in config.args]
    if not any(path.resolve().is_relative_to(GPU) for path in paths):
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    from eval.support import tiny  # imports Triton, so not before pytest_configure

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
