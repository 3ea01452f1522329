"""While tokens are generated nothing asks the device for a value, beyond what the stock model asks:
on a GPU each such question would wait until all work before it is done.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from eval.speed.counts import Operators
from eval.support import tiny
from eval.support.agreement import NO_PROCESSOR, ours, planted
from vlm_patch import wrap


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
        with Operators() as mode:
            output = model(**step, past_key_values=cache)
        counts.append(mode.waits)
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
