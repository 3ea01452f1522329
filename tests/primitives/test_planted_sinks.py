"""Sinks are found on the first prompt of families with grouped heads, windows, m-rope, normed
queries and linear attention between; what is found acts at once.
"""

import pytest
import torch

import vlm_patch
from eval.support.families import quietly
from tests.support.agreement import NO_PROCESSOR
from tests.support.planted import PLACE, SINKS, planted
from vlm_patch import VAR


@pytest.mark.filterwarnings(NO_PROCESSOR)
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "mistral3", "lighton_ocr", "qwen3_5"])
def test_sinks_are_found_and_act(kind: str) -> None:
    with quietly():
        model, inputs = planted(kind)
        options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        stock = model.generate(**inputs, **options).logits[0]
        with vlm_patch.wrap(model, VAR(min_image_mass=0.0)) as patch:
            found = model.generate(**inputs, **options).logits[0]
            assert f"tau=2.5, dims={tuple(SINKS)}" in patch.describe()
        with vlm_patch.wrap(model, VAR(dims=SINKS, min_image_mass=0.0)):
            known = model.generate(**inputs, **options).logits[0]
    assert torch.equal(found, known)
    assert (found - stock).abs().max() > 1e-4


def test_the_first_token_alone_can_be_the_sink() -> None:
    """BOS alone has massive activations and takes attention, as in most language models."""
    with quietly():
        model, inputs = planted("llava")
        for features in inputs["mm_encoder_outputs"]["image"]["pooler_output"]:
            features[PLACE] = features[PLACE + 1]
        with vlm_patch.wrap(model, VAR()) as patch:
            model.generate(**inputs, max_new_tokens=1)
            assert f"dims={tuple(SINKS)}" in patch.describe()


def test_without_sinks_nothing_is_guessed() -> None:
    """Massive activations alone do not make a sink: here nothing looks for them."""
    with quietly():
        model, inputs = planted("llava")
        for block in model.get_decoder().layers:
            block.self_attn.k_proj.weight.data[:, SINKS] = 0.0
        expected = r"No token takes more than [\d.]+% of the attention of the text behind the image"
        with vlm_patch.wrap(model, VAR()) as patch:
            with pytest.warns(UserWarning, match=expected):
                model.generate(**inputs, max_new_tokens=1)
            assert "dims=()" in patch.describe()
