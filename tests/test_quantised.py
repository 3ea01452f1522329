"""Linear layers in 8 bits (torchao): nothing that a patch relies on changes."""

from functools import cache

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import vlm_patch
from tests import tiny
from tests.compare import NO_PROCESSOR, ours, planted
from tests.modes import CLOSE, SIDES, generate, off, prompt
from vlm_patch.methods.sinks import _projected_norms

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


@cache
def models() -> tuple[nn.Module, nn.Module]:
    """A decoder in 8 bits, and the same with the rounded weights as plain ones."""
    rounded, plain = planted("llava"), planted("llava")
    quantize_(rounded.model.language_model, Int8WeightOnlyConfig())
    for one, other in zip(rounded.modules(), plain.modules(), strict=True):
        if isinstance(one, nn.Linear):
            other.weight.data = one.weight.dequantize()
    return rounded, plain


@pytest.mark.parametrize("names", SIDES.values(), ids="+".join)
def test_the_reference_on_the_rounded_weights(names: tuple[str, ...]) -> None:
    rounded, plain = models()
    batch = prompt(rounded, tiny.BATCH_OF_3)
    with vlm_patch.wrap(rounded, *ours(names)):
        output = generate(rounded, batch)
    assert off(plain, batch, output, names) <= CLOSE
    assert off(planted("llava"), batch, output, names) > 100 * CLOSE  # they were rounded


def test_with_every_head_off_and_taken_off_it_is_the_stock_model() -> None:
    model, _ = models()
    batch = prompt(model, tiny.BATCH_OF_3)
    stock = model(**batch).logits
    with vlm_patch.wrap(model, *ours(SIDES["all"])) as patch:
        assert not torch.equal(model(**batch).logits, stock)
        with patch.disabled():
            assert torch.equal(model(**batch).logits, stock)
        for name in patch.heads:
            patch.heads[name][:] = False
        assert torch.equal(model(**batch).logits, stock)
    assert torch.equal(model(**batch).logits, stock)


def test_the_search_for_sinks_reads_the_output_matrix() -> None:
    rounded, plain = (model.model.language_model.layers[0].self_attn for model in models())
    value = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    found = _projected_norms(value, rounded)
    torch.testing.assert_close(found, _projected_norms(value, plain))
    assert not torch.allclose(found, value.norm(dim=-1))
