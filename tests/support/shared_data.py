"""Third-party data files for tests: they lie beside the repository and are never part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def shared(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that reads those files, and skip it where they are not."""
    missing = pytest.mark.skipif(not SHARED.is_dir(), reason=f"there is no folder {SHARED}")
    marked: Callable[..., None] = pytest.mark.shared(missing(test))
    return marked
