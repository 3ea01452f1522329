"""What a generated token costs on any device: operators, and questions for a value on the device,
for each of which a GPU's host would wait until all work before it is done.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from eval.speed.counts import Operators, operators
from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.support.agreement import NO_PROCESSOR
from vlm_patch import wrap

METHODS = [("var",), ("gift",), ("vhr",), ("var", "gift", "vhr"), ("paint",)]
EDITS = ("pai", "vaf", "devils", "adhh", "iat", "adaiat", "sparc", "mass-target")
MOST = {"var": 72, "gift": 67, "vhr": 4, "var+gift+vhr": 135, "paint": 26}
"""Operators that a token takes beyond the stock model's 215: VAR acts in three of four layers, GIFT
in two. On a GPU kernels take the place of most of them."""


def decoded(model: nn.Module, kind: str, steps: int = 4) -> list[Operators]:
    """What each of a few steps of decoding dispatches."""
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    config: Any = model.config
    static = kind == "static"
    cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    token = model(**batch, past_key_values=cache, position_ids=positions).logits[:, -1:].argmax(-1)
    seen = []
    for _ in range(steps):
        mask, positions = torch.cat([mask, torch.ones_like(token)], 1), positions[:, -1:] + 1
        step = {"input_ids": token, "attention_mask": mask, "position_ids": positions}
        seen.append(operators(partial(model, **step, past_key_values=cache)))
    return seen


def asked(model: nn.Module, kind: str) -> list[int]:
    return [step.waits for step in decoded(model, kind)]


@pytest.mark.filterwarnings(NO_PROCESSOR)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("names", METHODS)
@torch.no_grad()
def test_operators_of_a_token(names: Sequence[str], cache: str) -> None:
    model = planted("llava")
    stock = decoded(model, cache)[-1].count
    with wrap(model, *ours(names)) as patch:
        assert decoded(model, cache)[-1].count - stock <= MOST["+".join(names)]
        for table in patch.heads.values():
            table[:] = False
        assert decoded(model, cache)[-1].count == stock


@pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:VAF multiplies")
@pytest.mark.parametrize("half", [False, True], ids=["all heads", "half of them"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("names", METHODS + [(name,) for name in EDITS])
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
