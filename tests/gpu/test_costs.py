"""What a generated token asks of a card: launches, and waits for its values."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

import vlm_patch
from eval.speed import counts
from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.gpu.conftest import DEVICE, apart
from tests.support.agreement import NO_PROCESSOR
from tests.support.on_device import moved

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "error:A fused kernel is left out")

if DEVICE.type == "cuda":

    @pytest.mark.parametrize(("name", "layers"), [("var", 3), ("gift-inside", 3), ("vhr", 0)])
    @torch.no_grad()
    def test_launches_and_waits_of_a_token(name: str, layers: int) -> None:
        """Six launches a layer at most; plain torch takes more than twenty. No waits."""
        model = planted("llava")
        batch = moved(tiny.inputs(model, tiny.ONE_IMAGE), DEVICE)
        model.to(DEVICE)

        def costs() -> tuple[int, int]:
            cache = DynamicCache(config=model.config)
            output = model(**batch, past_key_values=cache)
            token = {"input_ids": output.logits[:, -1:].argmax(-1), "past_key_values": cache}
            step = partial(model, **token)
            step()  # makes plans, and compares kernels
            return counts.launches(step, DEVICE), counts.waits(step, DEVICE)

        stock = costs()
        with vlm_patch.wrap(model, *ours((name,))):
            found = costs()
        apart[f"launches beyond stock's, {name}"] = found[0] - stock[0]
        assert found[1] <= stock[1]
        assert found[0] - stock[0] <= max(6 * layers, 4)
