"""Nullu: its projection against the paper's edit of the weights, and its directions."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.support import tiny
from eval.support.agreement import DIRECTIONS, planted
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.examples import assert_near, tensor
from vlm_patch import Nullu, wrap
from vlm_patch.methods.nullu import hallucination_directions, remove_directions

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


def test_example() -> None:
    """Along (0.6, 0.8, 0) nothing is left."""
    found = remove_directions(tensor([[1, 2, 3], [0.6, 0.8, 0]]), tensor([[0.6, 0.8, 0]]))
    assert_near(found, [[1 - 1.32, 2 - 1.76, 3], [0, 0, 0]])
    assert_near(remove_directions(found, tensor([[0.6, 0.8, 0]])), found.tolist())


def edited(model: Any, directions: dict[int, Tensor]) -> Any:
    """A copy of a model whose down projections W are (I - V V^T) W, as in the paper."""
    twin = copy.deepcopy(model)
    for layer, rows in directions.items():
        weight = twin.get_decoder().layers[layer].mlp.down_proj.weight
        basis = rows.double()
        weight.data = (torch.eye(len(weight)).double() - basis.T @ basis) @ weight.data
    return twin


def test_it_is_the_paper_s_edit_of_the_weights() -> None:
    model = tiny.float64(planted("llava"))
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    batch["pixel_values"] = batch["pixel_values"].double()
    expected = generate(edited(model, DIRECTIONS), batch)
    with wrap(model, Nullu(DIRECTIONS)):
        found = generate(model, batch)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)


def test_the_weights_are_never_written() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = generate(model, batch)
    before = [(id(p), p._version, p.clone()) for p in model.parameters()]
    with wrap(model, Nullu(DIRECTIONS)) as patch:
        assert not torch.allclose(generate(model, batch).logits[0], stock.logits[0], atol=1e-3)
        with patch.disabled():
            off = generate(model, batch)
    after = [(id(p), p._version, p) for p in model.parameters()]
    assert [one[:2] for one in before] == [one[:2] for one in after]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(before, after, strict=True))
    assert all(map(torch.equal, off.logits, stock.logits))


def test_directions_are_those_of_the_differences() -> None:
    """Differences of 3 along (1, 1, 0), 1 along (0, 0, 1) and none across."""
    true = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    along, second = tensor([1, 1, 0]) / 2**0.5, tensor([0, 0, 1])
    found = hallucination_directions(true + torch.stack((3 * along, second)), true, rank=2)
    assert_near((found @ torch.stack((along, second)).T).abs(), [[1, 0], [0, 1]])


@pytest.mark.parametrize(
    ("shapes", "rank", "message"),
    [
        (((5, 3), (4, 3)), 1, r"features: found shapes \(5, 3\) and \(4, 3\), expected \[N, D\]"),
        (((3,), (3,)), 1, "features: found shapes"),
        (((5, 3), (5, 3)), 4, "rank: found 4, expected 1 to 3, which is all that 5 pairs of"),
        (((5, 3), (5, 3)), 0, "rank: found 0"),
    ],
)
def test_features_that_do_not_fit(shapes: Any, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hallucination_directions(torch.ones(shapes[0]), torch.ones(shapes[1]), rank)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"Nullu directions: found None, expected directions \[r, D\] by layer"),
        ({"directions": DIRECTIONS, "rank": 0}, "Nullu rank: found 0, expected an integer of at"),
        ({"directions": DIRECTIONS, "rank": 9}, "Nullu rank: found 9, but layer 0 has"),
        ({"directions": DIRECTIONS, "layers": [1]}, "Nullu layers: found 1, expected one of"),
        ({"directions": {1: torch.ones(2, 64)}}, "layer 1 are not orthonormal .*: make them by"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(tiny.llava(), Nullu(**values))
