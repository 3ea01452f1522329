"""Caches and kernels other than the plain ones, against the slow reference."""

import copy
import inspect
import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.continuous_batching import continuous_api

from eval.support import tiny
from eval.support.agreement import ours, planted
from tests.support.agreement import ALONE, NO_PROCESSOR, TOGETHER, error, generate
from vlm_patch import GIFT, VAR, VHR, PatchError, wrap
from vlm_patch.engine.attention import Call

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)
CLOSE = 1e-5


def label(names: Sequence[str]) -> str:
    return "+".join(names)


@pytest.mark.parametrize("names", ALONE + TOGETHER, ids=label)
@pytest.mark.parametrize("kind", ["llava", "llava-gqa", "qwen2-vl"])
def test_a_static_cache(kind: str, names: Sequence[str]) -> None:
    model = planted(kind)
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(names)):
        output = generate(model, batch, cache_implementation="static")
        again = generate(model, batch, cache_implementation="static")
    assert error(model, batch, output, names) <= CLOSE
    assert torch.equal(output.sequences, again.sequences)


def test_beams_on_a_static_cache() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    found = []
    with wrap(model, *ours(("var", "gift", "vhr"))):
        for kind in ("dynamic", "static"):
            found.append(generate(model, batch, num_beams=3, cache_implementation=kind).sequences)
    assert torch.equal(*found)


@pytest.mark.parametrize("names", ALONE + TOGETHER, ids=label)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_sliding_window(names: Sequence[str], cache: str) -> None:
    model = tiny.sliding_llava()
    batch = tiny.inputs(model, tiny.MIXED_BATCH)
    with wrap(model, *ours(names)):
        output = generate(model, batch, steps=4, cache_implementation=cache)
    assert error(model, batch, output, names) <= CLOSE


def test_a_later_turn_that_would_need_a_cut() -> None:
    model = tiny.sliding_llava()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with wrap(model, *ours(("gift-inside",))):
        output = generate(model, batch, steps=4)
        turn = torch.cat((output.sequences, torch.tensor([[20, 21, 22]])), 1)
        with pytest.raises(PatchError, match="behind a cache needs one that can be cut"):
            model.generate(turn, past_key_values=output.past_key_values, max_new_tokens=2)


def test_softcap() -> None:
    """Scores are capped as Gemma 2 does it: cap * tanh(score / cap), before mask and softmax."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, dtype=torch.float64) * 3 for heads in (4, 2, 2))
    options = {"scaling": 0.5, "softcap": 2.0}
    module = SimpleNamespace(is_causal=True)
    call = Call(0, module, q, k, v, None, options, lambda: (q, None))
    z = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.5
    z = 2.0 * torch.tanh(z / 2.0)
    z = z.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    rows = torch.tensor([1, 3, 4])
    torch.testing.assert_close(call.weights(rows), z.softmax(-1)[:, :, rows], rtol=0, atol=1e-12)


def prompt_logits(model: nn.Module, names: Sequence[str]) -> Tensor:
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    with torch.no_grad():
        if not names:
            return model(**batch).logits[:, -1].double()
        with wrap(model, *ours(names)):
            return model(**batch).logits[:, -1].double()


@pytest.mark.parametrize("names", [("var",), ("gift",), ("vhr-unfiltered",)], ids=label)
def test_bfloat16_is_no_worse_than_eager(names: Sequence[str]) -> None:
    """The mean error against float32, beside that of the unpatched model under eager attention."""
    ours_apart, eager_apart = [], []
    for seed in range(1, 9):
        exact = tiny.plant(tiny.llava(seed=seed))
        half = copy.deepcopy(exact).bfloat16()
        eager = tiny.plant(tiny.llava(seed=seed, attn="eager")).bfloat16()
        ours_apart.append((prompt_logits(half, names) - prompt_logits(exact, names)).abs().mean())
        eager_apart.append((prompt_logits(eager, ()) - prompt_logits(exact, ())).abs().mean())
    assert torch.stack(ours_apart).median() <= 1.25 * torch.stack(eager_apart).median()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("names", [(), ("var",), ("gift",), ("vhr-unfiltered",)], ids=label)
def test_autocast_costs_what_it_costs_the_stock_model(names: Sequence[str], attn: str) -> None:
    """The mean error against float32, which methods that choose may enlarge; with every head off
    the stock model's bits.
    """
    ours_apart, stock_apart = [], []
    for seed in range(1, 9):
        model = tiny.plant(tiny.llava(seed=seed, attn=attn))
        exact, stock_exact = prompt_logits(model, names), prompt_logits(model, ())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, stock = prompt_logits(model, names), prompt_logits(model, ())
            batch = tiny.inputs(model, tiny.BATCH_OF_3)
            with wrap(model, *ours(names or ("var",))) as patch:
                answers = generate(model, batch, steps=2)
                for table in patch.heads.values():
                    table[:] = False
                assert torch.equal(model(**batch).logits[:, -1].double(), stock)
        assert all(step.isfinite().all() for step in answers.logits)
        ours_apart.append((found - exact).abs().mean())
        stock_apart.append((stock - stock_exact).abs().mean())
    assert torch.stack(ours_apart).median() <= 1.5 * torch.stack(stock_apart).median()


def test_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled forward breaks its graph where methods act, and is right. Without the compiler's
    trace in pytest's log, which takes longer than compiling.
    """
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    model = planted("llava", layers=2)
    batch = tiny.inputs(model, tiny.BATCH_OF_3[:2])
    methods = VAR(tau=3.0, dims=tiny.SINK_DIMS), VHR(layers=(1,))
    with wrap(model, *methods, GIFT(3.0, saliency_layer=0, layers=(1,))):
        plain = generate(model, batch, steps=3, cache_implementation="static")
        torch.compiler.reset()  # what was compiled for another model passes by hooks of this one
        model.forward = torch.compile(model.forward, backend="eager")
        compiled = generate(model, batch, steps=3, cache_implementation="static")
    for one, other in zip(plain.logits, compiled.logits, strict=True):
        assert (one - other).abs().max() <= CLOSE


@pytest.mark.filterwarnings("ignore:Continuous batching takes no images")
def test_continuous_batching_runs_stock() -> None:
    """It holds text alone: packed requests, several to a row, and a cache of its own. Older
    transformers look for the text's sizes in the whole model's config, and answer nothing.
    """
    works = "get_text_config" in inspect.getsource(continuous_api)
    model = planted("llava")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    more: dict[str, Any] = {}
    if hasattr(transformers, "ContinuousBatchingConfig"):  # unless told, it fills the memory
        small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
        more = {"continuous_batching_config": small}
    prompts = [[1, 5, 6, 20, 21], [1, 7, 8]]

    def answers() -> list[list[int]]:
        try:
            found = model.generate_batch(prompts, config, progress_bar=False, **more)
        except (AttributeError, ValueError):  # the sizes
            return []
        return [request.generated_tokens for request in found.values()]

    stock = answers()
    with wrap(model, *ours(("var", "gift", "vhr"))):
        assert answers() == stock
    assert [len(answer) for answer in stock] == ([3, 3] if works else [])
