"""Models in an adapter of PEFT, which calls the forward of the model past its hooks."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.support.agreement import NO_PROCESSOR, error, generate
from vlm_patch import PatchError, wrap

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)
NAMES = ("var", "gift", "vhr")


def adapted() -> tuple[Any, nn.Module]:
    """A model with a LoRA adapter that changes it, and the same model with the adapter merged."""
    torch.manual_seed(3)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(planted("llava"), lora).eval()
    merged = peft.get_peft_model(planted("llava"), lora).eval()
    merged.load_state_dict(model.state_dict())
    return model, merged.merge_and_unload()


@pytest.mark.parametrize("inner", [False, True], ids=["the adapter", "the model in it"])
def test_generate_and_forward(inner: bool) -> None:
    model, merged = adapted()
    batch = tiny.inputs(merged, tiny.BATCH_OF_3)
    stock = model(**batch).logits
    with wrap(model.get_base_model() if inner else model, *ours(NAMES)) as patch:
        output = generate(model.get_base_model(), batch)
        again = model.generate(**batch, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        if not inner:
            assert not torch.equal(model(**batch).logits, stock)
        said = "LlavaForConditionalGeneration (float32 on cpu): LlamaModel, 4 layers"
        assert patch.describe().startswith(said)
    assert error(merged, batch, output, NAMES) <= 2e-5
    assert torch.equal(output.sequences, again)
    assert torch.equal(model(**batch).logits, stock)
    assert not model._forward_pre_hooks


def test_wrapped_once() -> None:
    model, _ = adapted()
    with wrap(model, "vhr"), pytest.raises(PatchError, match="already wrapped"):
        wrap(model.get_base_model(), "vhr")
