"""While tokens are generated nothing asks the device for a value, beyond what the stock model asks:
on a GPU each such question would wait until all work before it is done.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from eval.support import tiny
from eval.support.agreement import NO_PROCESSOR, ours, planted
from vlm_patch import wrap

aten = torch.ops.aten
ASKING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Asked(TorchDispatchMode):
    """Counts the operations whose result, or whose size, depends on values on the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = args[1] if func in BY_INDEX else ()
        boolean = any(place is not None and place.dtype == torch.bool for place in places)
        self.count += func in ASKING or boolean
        return func(*args, **(kwargs or {}))


def asked(model: nn.Module, kind: str, steps: int = 4) -> list[int]:
    """How often each of a few steps of decoding asks."""
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    config: Any = model.config
    static = kind == "static"
    cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    token = model(**batch, past_key_values=cache, position_ids=positions).logits[:, -1:].argmax(-1)
    counts = []
    for _ in range(steps):
        mask, positions = torch.cat([mask, torch.ones_like(token)], 1), positions[:, -1:] + 1
        step = {"input_ids": token, "attention_mask": mask, "position_ids": positions}
        with Asked() as mode:
            output = model(**step, past_key_values=cache)
        counts.append(mode.count)
        token = output.logits[:, -1:].argmax(-1)
    return counts


@pytest.mark.filterwarnings(NO_PROCESSOR)
@pytest.mark.parametrize("half", [False, True], ids=["all heads", "half of them"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "names", [("var",), ("gift",), ("vhr",), ("var", "gift", "vhr"), ("paint",)]
)
@torch.no_grad()
def test_only_the_first_generated_token_asks(names: Sequence[str], cache: str, half: bool) -> None:
    model = planted("llava")
    stock = asked(model, cache)
    with wrap(model, *ours(names)) as patch:
        for table in patch.heads.values():
            table[:, ::2] &= not half
        found = asked(model, cache)
    assert found[1:] == stock[1:]
    assert (found[0] > stock[0]) == (names != ("vhr",)), "where rows are edited a plan is made"


@pytest.mark.filterwarnings(NO_PROCESSOR)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("names", [("vcd", "deco"), ("m3id", "icd", "dola")])
@torch.no_grad()
def test_streams_never_ask(names: Sequence[str], cache: str) -> None:
    """Not even whether a mask is full, as the stock model does with a dynamic cache."""
    model = planted("llava")
    with wrap(model, *ours(names)):
        assert asked(model, cache) == [0, 0, 0, 0]
