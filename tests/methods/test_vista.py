"""VISTA's mathematics: examples by hand, invariants, what it steers by, and its refusals."""

from typing import Any

import pytest
import torch

from eval.support import tiny
from eval.support.agreement import planted
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.examples import PRECISIONS, assert_near, tensor
from vlm_patch import VISTA, PatchError, wrap
from vlm_patch.method import ModelInfo
from vlm_patch.methods.vista import augment_logits, steer_towards

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_by_hand(dtype: torch.dtype) -> None:
    """m = (3, 4), v = (0, 2), lambda = 0.5: cos(m, -v) = -0.8 does not count, and unit(m) + 0.5
    unit(v) = (0.6, 1.3). For v = (0, -2) it does, so 0.9 unit(v): (0.6, -0.1).
    """
    for vector, direction in (([0, 2], (0.6, 1.3)), ([0, -2], (0.6, -0.1))):
        length = (direction[0] ** 2 + direction[1] ** 2) ** 0.5
        found = steer_towards(tensor([[[3, 4]]], dtype), tensor([vector], dtype), 0.5)
        assert_near(found, [[[5 * part / length for part in direction]]])


def test_example_of_the_logits() -> None:
    early = tensor([[1, 0, 0], [3, 2, 0]])
    assert_near(augment_logits(tensor([4, 1, 1]), early, 0.3), [0.7 * 4 + 0.6, 1.0, 0.7])
    assert_near(augment_logits(tensor([4, 1, 1]), early, 0.0), [4, 1, 1])


def test_lengths_stay_and_the_angle_shrinks() -> None:
    draw = torch.Generator().manual_seed(0)
    output = torch.randn(2, 5, 8, generator=draw, dtype=torch.float64)
    vector = torch.randn(2, 8, generator=draw, dtype=torch.float64)
    found = steer_towards(output, vector, 0.4)
    torch.testing.assert_close(found.norm(dim=-1), output.norm(dim=-1), rtol=0, atol=1e-12)
    cosine = torch.nn.functional.cosine_similarity
    towards = vector[:, None].expand_as(output)
    assert (cosine(found, towards, -1) > cosine(output, towards, -1)).all()
    torch.testing.assert_close(steer_towards(output, vector, 0.0), output, rtol=0, atol=1e-12)


def test_nothing_to_steer_by_or_to_steer_stays_finite() -> None:
    output = torch.randn(1, 2, 4)
    torch.testing.assert_close(steer_towards(output, torch.zeros(1, 4), 0.2), output)
    assert not steer_towards(torch.zeros(1, 2, 4), torch.ones(1, 4), 0.2).any()


def test_what_the_image_adds_is_what_two_passes_differ_by() -> None:
    model = planted("llava")
    batch = tiny.inputs(model)
    text = {"input_ids": batch["input_ids"][batch["input_ids"] != tiny.IMAGE][None]}
    with torch.no_grad():
        whole, alone = (
            model(**inputs, output_hidden_states=True).hidden_states for inputs in (batch, text)
        )
        with wrap(model, VISTA(layers=[0, 2])):
            cache = model(**batch, use_cache=True).past_key_values
    found = cache.vlm_patch.states["vista"].vector
    assert set(found) == {0, 2}
    for layer, vector in found.items():
        expected = whole[layer + 1][:, -1] - alone[layer + 1][:, -1]
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)


def test_a_later_image_steers_nothing_and_that_is_said() -> None:
    model = planted("llava")
    both = tiny.inputs(model, tiny.TWO_IMAGES)
    ids, end = both["input_ids"], 2 + 16 + 3
    with wrap(model, VISTA()):
        first = model(input_ids=ids[:, :end], pixel_values=both["pixel_values"][:1])
        step = model(input_ids=torch.tensor([[60]]), past_key_values=first.past_key_values)
        with pytest.warns(UserWarning, match="VISTA steers by the image of the conversation's"):
            model(
                input_ids=ids[:, end:],
                pixel_values=both["pixel_values"][1:],
                past_key_values=step.past_key_values,
            )


def test_a_prompt_in_parts_is_refused() -> None:
    model = planted("llava")
    batch = tiny.inputs(model)
    with wrap(model, VISTA()) as patch:
        read = {"input_ids": batch["input_ids"][:, :-3], "pixel_values": batch["pixel_values"]}
        cache = model(**read, use_cache=True).past_key_values
        with pytest.raises(PatchError, match="the whole prompt must be read in one forward"):
            model(input_ids=batch["input_ids"][:, -3:], past_key_values=cache)
        patch.heads["vista"][1:] = False
        cache = model(**read, use_cache=True).past_key_values
        patch.heads["vista"][2] = True
        with pytest.raises(PatchError, match="vista is on in layer 2, but knows nothing to steer"):
            model(input_ids=torch.tensor([[60]]), past_key_values=cache)


def test_defaults_and_values_out_of_range() -> None:
    info = ModelInfo(depth=6, width=8, heads=2, profile={}, softmax=(1, 3))
    assert (VISTA().strength, VISTA().resolve(info)[0].default_layers(6)) == (0.17, (1, 3))
    wrong: Any = "much"
    for values in ({"strength": -0.1}, {"strength": wrong}, {"layers": wrong}):
        with pytest.raises(ValueError, match=r"VISTA (strength|layers): found"):
            VISTA(**values)


def test_strength_0_is_the_stock_model() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = generate(model, batch)
    with wrap(model, VISTA(strength=0.0)):
        found = generate(model, batch)
    torch.testing.assert_close(found.logits, stock.logits, rtol=0, atol=1e-6)
