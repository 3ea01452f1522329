"""A steering vector of one's own: where it goes, and the values that are refused."""

from typing import Any

import pytest
import torch

from eval.support import tiny
from eval.support.agreement import VECTORS, planted
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.examples import assert_near, tensor
from vlm_patch import Steering, wrap
from vlm_patch.methods.steering import steered

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


def test_example() -> None:
    found = steered(tensor([[[1, 2], [0, -1]]]), tensor([0.5, -1]), -2.0)
    assert_near(found, [[[0, 4], [-1, 1]]])


def test_strength_0_changes_nothing() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = generate(model, batch)
    with wrap(model, Steering(VECTORS, strength=0.0)):
        found = generate(model, batch)
    assert all(map(torch.equal, found.logits, stock.logits))


def test_generated_leaves_the_prompt_alone() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = generate(model, batch)
    with wrap(model, Steering(VECTORS, positions="generated")):
        found = generate(model, batch)
    assert torch.equal(found.logits[0], stock.logits[0])
    assert not torch.allclose(found.logits[1], stock.logits[1], atol=1e-3)


def test_it_acts_where_it_has_vectors() -> None:
    model = tiny.llava()
    with wrap(model, Steering(VECTORS)) as patch:
        assert patch.heads["steering"].all(1).tolist() == [False, True, True, False]
    with wrap(model, Steering(VECTORS, layers=[2])) as patch:
        assert patch.heads["steering"].all(1).tolist() == [False, False, True, False]
        assert "Steering(vectors=<layers [1, 2] of a mapping>" in patch.describe()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Steering vectors: found None, expected a vector"),
        ({"vectors": VECTORS, "strength": "a lot"}, "Steering strength: found 'a lot'"),
        ({"vectors": VECTORS, "positions": "first"}, "Steering positions: found 'first'"),
        ({"vectors": VECTORS, "layers": [-1]}, "Steering layers: found -1"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Steering(**values)


def test_vectors_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match=r"expected \[D\] with D = 64, the width of this model"):
        wrap(tiny.llava(), Steering({1: torch.ones(3)}))
