"""MemVR's mathematics: examples by hand, when it looks, and its refusals."""

import math
from typing import Any
from unittest import mock

import pytest
import torch

from eval.support import tiny
from eval.support.agreement import planted
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.examples import PRECISIONS, assert_near, places, tensor
from vlm_patch import MemVR, PatchError, wrap
from vlm_patch.method import ModelInfo
from vlm_patch.methods.memvr import gather, mix, retrace, uncertainty

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:no published settings")


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_uncertainty_by_hand(dtype: torch.dtype) -> None:
    """Of ten equal ones 1; of two equal ones far above the rest ln 2 / ln 10, log10 of 2; of one 0.
    What lies below the ten largest does not count.
    """
    cases = tensor([[0.0] * 10 + [-9] * 5, [5e3, 5e3] + [0] * 13, [5e3] + [0] * 14], dtype)
    assert_near(uncertainty(cases), [1, math.log10(2), 0])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_the_second_look_by_hand(dtype: torch.dtype) -> None:
    """x = (1, 2), Z = (1, 0), (1, 1): x Z^T = (1, 3), y = (4, 3); FFN(x) = (7, 7), so the quotient
    is 2, and a quarter of it gives 0.75 (7, 7) + 0.25 (8, 6).
    """
    features = tensor([[[1, 0], [1, 1], [0, 0]]], dtype)
    traced = retrace(tensor([[[1, 2]]], dtype), features)
    assert_near(traced, [[[4, 3]]])
    assert_near(
        mix(tensor([[[7, 7]]], dtype), traced, tensor([[2]], dtype), 0.25), [[[7.25, 6.75]]]
    )


def test_image_tokens_are_gathered_in_their_order() -> None:
    embeds = torch.arange(8.0).view(2, 4, 1) + 1
    chosen = torch.tensor([[False, True, True, False], [False, False, False, True]])
    assert gather(embeds, chosen)[..., 0].tolist() == [[2, 3], [8, 0]]


def looks(model: Any, method: MemVR, batch: Any, **options: Any) -> list[tuple[int, list[int]]]:
    """The layers, and the samples that look there, in every forward of two generated tokens."""
    seen: list[tuple[int, list[int]]] = []
    real = MemVR.edit_mlp

    def edit_mlp(
        self: MemVR, layer: int, output: Any, hidden: Any, forward: Any, state: Any
    ) -> Any:
        seen.append((layer, places(state.now[:, -1])))
        return real(self, layer, output, hidden, forward, state)

    with mock.patch.object(MemVR, "edit_mlp", edit_mlp), wrap(model, method):
        generate(model, batch, 2, **options)
    return seen


def test_one_look_a_forward_in_the_first_unsure_layer() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    always = looks(model, MemVR(threshold=0.0, layers=[1, 2, 3]), batch)
    assert always == [(1, [0, 1, 2]), (2, []), (3, [])] * 2
    never = looks(model, MemVR(threshold=1.0, layers=[1, 2, 3]), batch)
    assert never == [(1, []), (2, []), (3, [])] * 2
    some = looks(model, MemVR(threshold=0.997, layers=[1, 2, 3]), batch)
    for forward in (some[:3], some[3:]):
        samples = [sample for _, found in forward for sample in found]
        assert len(samples) == len(set(samples)), "one look each"
    assert len({layer for layer, found in some if found}) > 1, "each by its own layer"


def test_nothing_is_looked_at_where_it_is_sure() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = generate(model, batch)
    for method in (MemVR(threshold=1.0), MemVR(share=0.0, threshold=0.0)):
        with wrap(model, method):
            found = generate(model, batch)
        torch.testing.assert_close(found.logits, stock.logits, rtol=0, atol=1e-6)


def test_the_hooks_of_the_head_see_the_model_s_logits_alone() -> None:
    model = planted("llava")
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    with wrap(model, MemVR()):
        model.generate(**tiny.inputs(model), max_new_tokens=3, min_new_tokens=3)
    assert len(calls) == 3


def test_a_prompt_in_parts_is_refused() -> None:
    model = planted("llava")
    batch = tiny.inputs(model)
    read = {"input_ids": batch["input_ids"][:, :-3], "pixel_values": batch["pixel_values"]}
    with wrap(model, MemVR()) as patch:
        cache = model(**read, use_cache=True).past_key_values
        with pytest.raises(PatchError, match="a prompt must be read in one forward"):
            model(input_ids=batch["input_ids"][:, -3:], past_key_values=cache)
        with patch.disabled("memvr"), wrap(planted("llava"), MemVR()):
            pass
        patch.heads["memvr"][:] = False
        patch.heads["memvr"][0] = True


def test_an_image_that_it_did_not_see_is_said() -> None:
    model = planted("llava")
    batch = tiny.inputs(model)
    with wrap(model, "vhr", MemVR()) as patch:
        with patch.disabled("memvr"):
            cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(PatchError, match="memvr was off when the image of this conversation"):
            model(input_ids=torch.tensor([[60]]), past_key_values=cache)


def test_layers_are_published_or_scaled() -> None:
    published = ModelInfo(depth=32, width=4096, heads=32, profile={"layers": tuple(range(7, 17))})
    fitted, notes = MemVR().resolve(published)
    assert (list(fitted.default_layers(32)), notes) == (list(range(7, 17)), [])
    for depth, layers in ((32, range(7, 17)), (16, range(4, 8)), (4, range(1, 2)), (1, range(1))):
        fitted, notes = MemVR().resolve(ModelInfo(depth=depth, width=8, heads=2, profile={}))
        assert list(fitted.default_layers(depth)) == list(layers)
        assert notes == [f"MemVR layers={list(layers)}"]


@pytest.mark.parametrize("values", [{"share": 1.5}, {"threshold": -1}, {"layers": "7-16"}])
def test_values_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"MemVR (share|threshold|layers): found"):
        MemVR(**values)
