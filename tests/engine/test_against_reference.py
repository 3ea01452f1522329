"""The library against the slow literal reference: logits of the prompt and of 8 new tokens."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlm_patch
from eval.support import tiny
from eval.support.agreement import MODELS, PAIRS, ours, planted, reference
from eval.support.reference import Var, logits
from tests.support.agreement import ALONE, NO_PROCESSOR, TOGETHER, error, generate
from vlm_patch import GIFT, VAR

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:VAF multiplies")
BATCHES = {
    "one image": tiny.ONE_IMAGE,
    "left-padded batch of 3": tiny.BATCH_OF_3,
    "two images": tiny.TWO_IMAGES,
    "one and two images": tiny.MIXED_BATCH,
}
LARGEST = "one and two images"
CLOSE = 1e-5
EXACT = 1e-10


@cache
def model_of(kind: str, attn: str = "sdpa") -> nn.Module:
    return planted(kind, attn=attn)


@cache
def exact_model(kind: str) -> nn.Module:
    return tiny.float64(model_of(kind))


def batch_of(model: nn.Module, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    batch = tiny.inputs(model, rows)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch


def run(model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str], **options: Any) -> Any:
    with vlm_patch.wrap(model, *ours(names), **options):
        return generate(model, batch)


def label(names: Sequence[str]) -> str:
    return "+".join(names)


@pytest.mark.parametrize("names", ALONE + TOGETHER, ids=label)
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("kind", MODELS)
def test_generation(kind: str, rows: str, names: Sequence[str]) -> None:
    model = model_of(kind)
    batch = batch_of(model, BATCHES[rows])
    assert error(model, batch, run(model, batch, names), names) <= CLOSE


@pytest.mark.parametrize("names", ALONE + TOGETHER, ids=label)
@pytest.mark.parametrize("kind", MODELS)
def test_generation_in_float64(kind: str, names: Sequence[str]) -> None:
    """No rounding to hide behind: what is left is the order of sums."""
    model = exact_model(kind)
    batch = batch_of(model, BATCHES[LARGEST])
    assert error(model, batch, run(model, batch, names), names) <= EXACT


@pytest.mark.parametrize("names", [("var",), ("gift-inside",), ("vhr",), TOGETHER[0]], ids=label)
@pytest.mark.parametrize("kind", MODELS)
def test_generation_on_eager_attention(kind: str, names: Sequence[str]) -> None:
    model = model_of(kind, "eager")
    batch = batch_of(model, BATCHES[LARGEST])
    assert error(model, batch, run(model, batch, names), names) <= CLOSE


@pytest.mark.parametrize("names", ALONE + TOGETHER, ids=label)
@pytest.mark.parametrize("kind", ["llava-gqa", "qwen2-vl"])
def test_every_row_of_the_prompt(kind: str, names: Sequence[str]) -> None:
    """A raw forward: the rows before the last one are what later turns read from the cache."""
    model = exact_model(kind)
    batch = batch_of(model, BATCHES[LARGEST])
    if kind.startswith("llava"):  # as generate() gives them; a raw forward would count the padding
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with vlm_patch.wrap(model, *ours(names)), torch.no_grad():
        found = model(**batch).logits
    for row, sample in enumerate(tiny.samples(model, batch)):
        expected = logits(model, sample, reference(names))
        torch.testing.assert_close(found[row, -sample.length :], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", PAIRS)
def test_the_methods_change_much_more_than_the_tolerance(name: str) -> None:
    """So that agreement means something."""
    model = model_of("llava")
    batch = batch_of(model, BATCHES[LARGEST])
    assert error(model, batch, run(model, batch, [name]), []) > 1000 * CLOSE


def random_tables(names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Half of the heads of every method, in its own layers but one."""
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for name in names:
        spec, method = PAIRS[name]
        if not method.acts_in_layers:
            continue
        acting = (
            spec.acts_in
            if isinstance(spec, Var)
            else lambda layer, _, own=spec: layer in own.layers
        )
        own = [layer for layer in range(4) if acting(layer, 4)]
        table = torch.rand(4, 4, generator=generator) < 0.5
        if method.edits_hidden or method.edits_mlp:  # which has no heads
            table = table[:, :1].repeat(1, 4)
        kept = own[1:] or own
        table[[layer for layer in range(4) if layer not in kept]] = False
        tables[method.name] = table
    return tables


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("names", [*ALONE, TOGETHER[0], TOGETHER[2], TOGETHER[4]], ids=label)
@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
def test_some_heads_off(kind: str, names: Sequence[str], seed: int) -> None:
    model = exact_model(kind)
    batch = batch_of(model, BATCHES["left-padded batch of 3"])
    tables = random_tables(names, seed)
    output = run(model, batch, names, heads=tables)
    assert error(model, batch, output, names, heads=tables) <= EXACT


@pytest.mark.parametrize(
    "names", [("gift",), ("gift-inside",), TOGETHER[0], TOGETHER[3]], ids=label
)
@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
def test_query_and_words_by_hand(kind: str, names: Sequence[str]) -> None:
    """Words that lie apart, a question that ends early, and a row without any content word."""
    model = exact_model(kind)
    batch = batch_of(model, BATCHES["left-padded batch of 3"])
    ids = batch["input_ids"]
    query = (ids >= 20) & (ids < 60)
    query[:, -2:] = False
    words = torch.isin(ids, torch.tensor([21, 24, 32, 33, 36, 5]))
    methods = [
        GIFT(m.alpha, m.beta, m.saliency_layer, m.layers, m.head_fraction, words)
        if isinstance(m, GIFT)
        else m
        for m in ours(names)
    ]
    with vlm_patch.wrap(model, *methods) as patch, patch.prompt(query=query):
        output = generate(model, batch)
    assert error(model, batch, output, names, query=query, content=words) <= EXACT


def test_an_image_mask_by_hand() -> None:
    """Other positions than the placeholders: the methods follow the mask."""
    model, names = exact_model("llava"), ("var", "gift")
    batch = batch_of(model, BATCHES["left-padded batch of 3"])
    image = batch["input_ids"] == tiny.IMAGE
    image &= image.flip(1).cumsum(1).flip(1) > 4  # without the last four of every image
    with vlm_patch.wrap(model, *ours(names)) as patch, patch.prompt(image=image):
        output = generate(model, batch)
    assert error(model, batch, output, names, image=image) <= EXACT


@pytest.mark.parametrize("names", [("var",), ("gift",), ("gift-inside",), TOGETHER[0]], ids=label)
@pytest.mark.parametrize("kind", ["llava-gqa", "qwen2-vl"])
def test_rows_in_chunks_of_one(
    kind: str, names: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_patch.engine.rows.WEIGHTS_BUDGET", 1)
    model = exact_model(kind)
    batch = batch_of(model, BATCHES[LARGEST])
    assert error(model, batch, run(model, batch, names), names) <= EXACT


def test_a_step_at_a_time_with_no_cache_is_the_same() -> None:
    """`use_cache=False` in a raw forward: prompt and answer are one prompt to the library."""
    model = exact_model("llava")
    batch = batch_of(model, BATCHES["one image"])
    with vlm_patch.wrap(model, VAR(tau=3.0, dims=tiny.SINK_DIMS)), torch.no_grad():
        found = model(**batch, use_cache=False)
    expected = logits(model, tiny.samples(model, batch)[0], reference(["var"]))
    assert found.past_key_values is None
    torch.testing.assert_close(found.logits[0], expected, rtol=0, atol=EXACT)
