"""The worked examples of the specifications, as tensors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXAMPLES: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "worked_examples.json").read_text(encoding="utf-8")
)
PRECISIONS = [torch.float64, torch.float32]


def tensor(values: object, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def mask(places: Sequence[int], length: int) -> Tensor:
    found = torch.zeros(length, dtype=torch.bool)
    found[list(places)] = True
    return found


def places(found: Tensor) -> list[int]:
    return found.nonzero().flatten().tolist()


def assert_near(found: Tensor, expected: object, atol: float | None = None) -> None:
    """Within 1e-9, or within 1e-5 where `found` is float32."""
    atol = (1e-5 if found.dtype == torch.float32 else 1e-9) if atol is None else atol
    torch.testing.assert_close(found.double(), tensor(expected), rtol=0, atol=atol)
