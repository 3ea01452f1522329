"""A whole model on a device whose tensors may not meet the CPU's: what the CPU gives."""

import pytest
import torch

from eval.support.simulated_device import FAR, second_device
from eval.support.ways import MODES, SIDES, measure
from tests.support.agreement import NO_PROCESSOR
from tests.support.on_device import CASES, CPU, ELSEWHERE, modes_on

pytestmark = pytest.mark.filterwarnings(
    NO_PROCESSOR, "ignore:no published settings", "ignore:VAR does nothing"
)
MIXED = "all, map from an edited layer"


@pytest.mark.parametrize("name", CASES)
def test_what_the_cpu_gives(name: str) -> None:
    expected = CASES[name](CPU)
    with second_device():
        found = CASES[name](FAR)
    assert torch.equal(found[0], expected[0]) or name == "sinks that are found"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


NOT_SIMULATED = ("two threads on one model", "compiled, fullgraph")
"""The simulation is known to one thread alone, and torch.compile does not know it."""
KNOWN = [n for n, mode in MODES.items() if mode.known and n not in (*ELSEWHERE, *NOT_SIMULATED)]


@pytest.mark.parametrize("name", KNOWN)
def test_every_way_of_generating(name: str) -> None:
    """`eval modes` with the models on the device and the reference on the CPU."""
    with second_device(), modes_on(FAR):
        row = measure(name, MIXED)
    assert row.ok, row
    in_parts = name in ("chunked prefill", "questions behind a cached image")
    assert (row.max_error is None) == in_parts, "VHR reads no prompt in parts"


@pytest.mark.parametrize("side", [side for side in SIDES if side != MIXED])
@pytest.mark.parametrize("name", ["beams", "second turn on the returned cache", "static cache"])
def test_each_method_alone(name: str, side: str) -> None:
    with second_device(), modes_on(FAR):
        row = measure(name, side)
    assert row.max_error is not None
    assert row.ok, row


@pytest.mark.parametrize("side", ["var", "gift", "gift, map from an edited layer"])
def test_chunks_of_a_prompt(side: str) -> None:
    with second_device(), modes_on(FAR):
        row = measure("chunked prefill", side)
    assert row.max_error is not None
    assert row.ok, row
