"""What test_quantised.py asks, of torchao's 8-bit linears: `make test-torchao`.

Apart, since transformers imports torchao wherever it is installed, which takes time and warns.
"""

from functools import cache

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from eval.support.ways import SIDES
from tests.models.test_quantised import check_that_off_is_stock, check_the_reference, norms, pair
from tests.support.agreement import NO_PROCESSOR

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


@cache
def models() -> tuple[nn.Module, nn.Module]:
    return pair(
        lambda decoder: quantize_(decoder, Int8WeightOnlyConfig()),
        lambda linear: linear.weight.dequantize(),
    )


@pytest.mark.parametrize("names", SIDES.values(), ids="+".join)
def test_the_reference_on_the_rounded_weights(names: tuple[str, ...]) -> None:
    check_the_reference(models(), names)


def test_off_is_stock() -> None:
    check_that_off_is_stock(models()[0])


def test_the_search_for_sinks_reads_the_output_matrix() -> None:
    rounded, plain = models()
    torch.testing.assert_close(norms(rounded)[0], norms(plain)[0])
