"""SPARC: a rise by hand, the running mean, what it refuses, and what the cache keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.methods.test_attention_edits import context, info
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.examples import assert_near, mask, tensor
from vlm_patch import SPARC, PatchError, wrap
from vlm_patch.method import Phase, Position
from vlm_patch.methods.sparc import RiseState, risen, running_mean

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:no published settings")
METHOD = SPARC(2.0, 0.5, 0.1, layer=1, layers=(0, 1))


def test_a_rise_by_hand() -> None:
    attention, mean = tensor([[0.3, 0.29, 0.1, 0.0]]), tensor([[0.2, 0.2, 0.0, 0.0]])
    assert risen(attention, mean, 0.45).tolist() == [[True, True, True, False]]
    assert risen(attention, mean, 0.49).tolist() == [[True, False, True, False]]
    assert_near(running_mean(attention, mean, 0.1), [[0.29, 0.281, 0.09, 0.0]])


def test_three_tokens_by_hand() -> None:
    """BOS and two image tokens, then text; the second image token rises twice."""
    state, image = RiseState(), [1, 2]
    seen = [[0.5, 0.3, 0.1, 0.1], [0.3, 0.2, 0.3, 0.1, 0.1], [0.2, 0.1, 0.5, 0.1, 0.05, 0.05]]
    factors = [None, [1, 1, 1, 1, 1], [1, 1, 2, 1, 1, 1], [1, 1, 4, 1, 1, 1, 1]]
    for step, expected in enumerate(factors):
        keys = 4 + step
        forward = context(mask(image, keys)[None], starts=step == 0)
        if step:
            forward.position = Position(keys - 1, Phase.DECODE, prompt_end=4)
        METHOD.before_forward(forward, state)
        if expected is not None:
            ones = torch.full((1, 1, 1, keys), 1.0, dtype=torch.float64)
            assert_near(METHOD.edit_weights(0, ones, forward, state), [[[expected]]])
        if step < len(seen):
            weights = tensor(seen[step])[None, None, None].expand(1, 2, 1, -1)
            METHOD.observe(1, weights, torch.tensor([keys - 1]), forward, state)


def test_the_first_two_tokens_are_the_stock_models() -> None:
    """A token sees what those before it picked, and the prompt picks nothing."""
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = generate(model, batch, 4)
    with wrap(model, *ours(["sparc"])):
        found = generate(model, batch, 4)
        again = generate(model, batch, 4)
    for step in range(2):
        torch.testing.assert_close(found.logits[step], stock.logits[step], rtol=0, atol=1e-5)
    assert (found.logits[2] - stock.logits[2]).abs().max() > 1e-2
    assert torch.equal(again.sequences, found.sequences)


def test_the_cache_holds_the_values_of_the_model() -> None:
    """Where no other row was edited: the values of the prompt are the stock model's."""
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)

    def values() -> list[Tensor]:
        cache = generate(model, batch, 4).past_key_values
        return [layer.values[:, :, : batch["input_ids"].shape[1]] for layer in cache.layers]

    stock = values()
    with wrap(model, *ours(["sparc"])):
        assert all(map(torch.equal, values(), stock))


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}],
    ids=["use_cache", "prompt lookup"],
)
def test_tokens_must_come_one_by_one(options: dict[str, Any]) -> None:
    model = planted("llava")
    batch = tiny.inputs(model, [[tiny.BOS, tiny.IMAGE, *[21, 22, 23, 24] * 3, 25, 21]])
    with (
        wrap(model, *ours(["sparc"])),
        pytest.raises(PatchError, match=r"^sparc needs generated tokens one by one"),
    ):
        generate(model, batch, 8, **options)


def test_it_must_be_on_from_the_prompt_on() -> None:
    model = planted("llava")
    batch = tiny.inputs(model)
    with wrap(model, *ours(["sparc", "pai"])) as patch, torch.no_grad():
        with patch.disabled("sparc"):
            cache = model(**batch).past_key_values
        with pytest.raises(PatchError, match=r"^sparc is on, but was off when the prompt was read"):
            model(input_ids=torch.tensor([[60]]), past_key_values=cache)


def test_defaults() -> None:
    fitted, notes = SPARC().resolve(info(32))
    assert (fitted.layer, list(fitted.default_layers(32))) == (20, [*range(32)])
    assert notes == ["SPARC layer=20"]
    assert SPARC().resolve(info(6))[0].layer == 4
    assert (SPARC().alpha, SPARC().tau, SPARC().beta) == (1.1, 1.5, 0.1)


BAD = [
    ({"alpha": 0}, "SPARC alpha: found 0, expected a finite number above 0"),
    ({"tau": -1}, "SPARC tau: found -1, expected a finite number of at least 0"),
    ({"beta": 2}, "SPARC beta: found 2, expected a number from 0 to 1"),
    ({"layer": 1.5}, "SPARC layer: found 1.5, expected an integer of at least 0"),
]


@pytest.mark.parametrize(("given", "text"), BAD, ids=[text for _, text in BAD])
def test_wrong_values(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        SPARC(**given)
