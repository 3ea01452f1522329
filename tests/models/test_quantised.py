"""Linear layers in 8 bits change nothing that a patch relies on; see with_torchao.py too."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import vlm_patch
from eval.support import tiny
from eval.support.agreement import ours, planted
from eval.support.ways import CLOSE, SIDES, generate, off, prompt
from tests.support.agreement import NO_PROCESSOR
from vlm_patch.primitives.sinks import _projected_norms

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


class Int8Linear(nn.Module):
    """Weights as whole numbers with a scale per output, as bitsandbytes keeps them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (plain.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, rounded_weight(self), self.bias)


def rounded_weight(linear: Int8Linear) -> Tensor:
    return linear.weight * linear.scale


def round_all(decoder: nn.Module) -> None:
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


def pair(
    quantise: Callable[[nn.Module], None], weight_of: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module, nn.Module]:
    """A model whose decoder is quantised, and the same with the rounded weights as plain ones."""
    rounded, plain = planted("llava"), planted("llava")
    quantise(rounded.model.language_model)
    modules = dict(rounded.model.language_model.named_modules())
    for name, module in plain.model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = weight_of(modules[name])
    return rounded, plain


def check_the_reference(models: tuple[nn.Module, nn.Module], names: tuple[str, ...]) -> None:
    rounded, plain = models
    batch = prompt(rounded, tiny.BATCH_OF_3)
    with vlm_patch.wrap(rounded, *ours(names)):
        output = generate(rounded, batch)
    assert off(plain, batch, output, names) <= CLOSE
    assert off(planted("llava"), batch, output, names) > 100 * CLOSE  # they were rounded


def check_that_off_is_stock(model: nn.Module) -> None:
    """Every head off, disabled, and taken off: bit for bit."""
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


def norms(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Value-path norms as VAR's search for sinks takes them, and the values' own."""
    value = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    return _projected_norms(value, model.model.language_model.layers[0].self_attn), value.norm(
        dim=-1
    )


@cache
def models() -> tuple[nn.Module, nn.Module]:
    return pair(round_all, rounded_weight)


@pytest.mark.parametrize("names", SIDES.values(), ids="+".join)
def test_the_reference_on_the_rounded_weights(names: tuple[str, ...]) -> None:
    check_the_reference(models(), names)


def test_off_is_stock() -> None:
    check_that_off_is_stock(models()[0])


def test_whole_numbers_without_their_scale_are_not_taken_for_the_output_matrix() -> None:
    rounded, plain = models()
    assert torch.equal(*norms(rounded))
    assert not torch.allclose(*norms(plain))
