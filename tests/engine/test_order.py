"""Methods on attention together: commuting pairs commute, all others act in the order given."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import vlm_patch
from eval.support import tiny
from eval.support.agreement import answer_logits, ours, planted
from tests.support.agreement import NO_PROCESSOR, generate

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:VAF multiplies")
COMMUTE = [
    ("pai", "vaf", "|z| grows with z, whatever its sign"),
    ("pai", "paint", "z + c |z| keeps the sign of z"),
    ("vaf", "paint", "the same"),
    ("vaf", "devils", "a mean of |z| grows with z too"),
    ("pai", "iat", "they move different keys"),
    ("pai", "adhh", "scores come before weights in any order"),
    ("devils", "mass-target", "the same"),
    ("vaf", "var", "the same"),
    ("adhh", "vhr", "weights come before heads"),
]
FOLLOW = [
    ("pai", "devils", "the mean is over what was raised"),
    ("adaiat", "adhh", "what is boosted is dropped, or not"),
    ("adhh", "mass-target", "what is dropped is given out again, or not"),
    ("mass-target", "var", "the mass decides which heads look at the image"),
]


@cache
def model_of() -> nn.Module:
    return tiny.float64(planted("llava-gqa"))


def both(one: str, other: str) -> tuple[Tensor, Tensor, list[float]]:
    """Logits of an answer that is dictated, in both orders, and how far each is from the
    reference in that order.
    """
    model = model_of()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    batch["pixel_values"] = batch["pixel_values"].double()
    dictated = torch.tensor([[60, tiny.SINK_WORD, 61, 62]]).expand(3, -1)
    found, apart = [], []
    for names in ((one, other), (other, one)):
        logits = dictate(model, batch, dictated, names)
        samples = tiny.samples(model, batch, dictated)
        expected = answer_logits(model, samples, names)
        found.append(logits)
        apart.append(float((logits - expected).abs().max()))
    return found[0], found[1], apart


def dictate(
    model: nn.Module, batch: dict[str, Tensor], answer: Tensor, names: Sequence[str]
) -> Tensor:
    length = batch["input_ids"].shape[1]

    def only(sample: int, ids: Tensor) -> list[int]:
        row = min(sample, len(answer) - 1)
        return [int(answer[row, min(len(ids) - length, answer.shape[1] - 1)])]

    with vlm_patch.wrap(model, *ours(names)):
        output = generate(model, batch, answer.shape[1], prefix_allowed_tokens_fn=only)
    assert torch.equal(output.sequences[:, length:], answer)
    return torch.stack(output.logits, 1)


@pytest.mark.parametrize(("one", "other", "reason"), COMMUTE)
def test_pairs_that_commute(one: str, other: str, reason: str) -> None:
    first, second, apart = both(one, other)
    assert max(apart) <= 1e-10
    torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("one", "other", "reason"), FOLLOW)
def test_others_follow_the_order_given(one: str, other: str, reason: str) -> None:
    first, second, apart = both(one, other)
    assert max(apart) <= 1e-10
    assert (first - second).abs().max() > 1e-3
