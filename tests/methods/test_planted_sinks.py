"""Sinks are found on the first prompt of families with grouped heads, windows, m-rope, normed
queries and linear attention between; what is found acts at once.
"""

import pytest
import torch

import vlm_patch
from eval.families import quietly
from tests.compare import NO_PROCESSOR
from tests.planted import PLACE, SINKS, planted
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
            assert f"dims={tuple(SINKS)}" in patch.describe()
        with vlm_patch.wrap(model, VAR(dims=SINKS, min_image_mass=0.0)):
            known = model.generate(**inputs, **options).logits[0]
    assert torch.equal(found, known)
    assert (found - stock).abs().max() > 1e-4


def test_without_the_image_sink_nothing_is_guessed() -> None:
    """BOS alone has massive activations: no image token shows that they draw attention."""
    with quietly():
        model, inputs = planted("llava")
        for features in inputs["mm_encoder_outputs"]["image"]["pooler_output"]:
            features[PLACE] = features[PLACE + 1]
        expected = r"flag 0.0% of the image tokens, expected 0.2 to 3 %"
        with vlm_patch.wrap(model, VAR()) as patch:
            with pytest.warns(UserWarning, match=expected):
                model.generate(**inputs, max_new_tokens=1)
            assert "dims=()" in patch.describe()
