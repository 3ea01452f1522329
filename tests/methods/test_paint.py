"""PAINT's mathematics: worked examples, invariants, bounds and defaults."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.support import tiny
from tests.support.agreement import NO_PROCESSOR
from tests.support.examples import EXAMPLES, PRECISIONS, assert_near, mask, places, tensor
from vlm_patch import PAINT, VAR, wrap
from vlm_patch.engine.attention import Call
from vlm_patch.method import ModelInfo
from vlm_patch.methods.paint import outliers, token_sets, top
from vlm_patch.primitives.key_bias import raised

EXAMPLE, CLIFF = EXAMPLES["paint"]["A6"], EXAMPLES["paint"]["cliff"]
pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


# ---- worked examples


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_the_sets(dtype: torch.dtype) -> None:
    given, expected = EXAMPLE["inputs"], EXAMPLE["expected"]
    local, summary = (
        tensor(given[f"vit_{layer}_cls_rows"], dtype).sum(0) for layer in ("first", "penultimate")
    )
    assert_near(local, expected["s_loc"])
    assert_near(summary, expected["s_sum"])
    assert places(top(local, given["rho"])) == expected["L0"]
    assert places(outliers(summary)) == expected["S"]
    found = token_sets(local, summary, given["rho"])
    assert [places(one) for one in found] == [expected["L"], expected["S"]]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    ("name", "local", "summary"), [("paint", 0.7, 0.4), ("pai_alpha0.5", 0.5, 0.5)]
)
def test_example_of_the_row(name: str, local: float, summary: float, dtype: torch.dtype) -> None:
    given, expected = EXAMPLE["inputs"], EXAMPLE["expected"]
    visual = given["visual_keys"]
    chosen = [visual[i] for i in expected["L"]], [visual[i] for i in expected["S"]]
    if name != "paint":  # PAI raises every patch
        chosen = visual, []
    strength = local * mask(chosen[0], 12).to(dtype) + summary * mask(chosen[1], 12).to(dtype)
    scores = raised(tensor(given["logits"], dtype), strength)
    assert_near(scores, expected[name]["logits"])
    assert_near(scores.softmax(-1), expected[name]["attention"])


def test_example_of_the_cliff() -> None:
    """The mass on the image against alpha, by how high its scores are."""
    draw, alphas = np.random.default_rng(1), CLIFF["inputs"]["alphas"]
    for row in CLIFF["expected"]:
        visual = tensor(draw.normal(row["mu"], 1, 576))
        others = tensor([8, 2, 3, *draw.normal(1.5, 1, 60)])
        for alpha, expected in zip(alphas, row["visual_mass"], strict=True):
            moved = raised(visual, torch.full_like(visual, alpha))
            assert_near(torch.cat([moved, others]).softmax(-1)[:576].sum(), expected)


# ---- bounds


def test_ties_go_to_the_lowest_patch() -> None:
    assert places(top(tensor([1, 2, 2, 2]), 0.5)) == [1, 2]
    assert places(top(tensor([1, 1, 1, 1]), 0.25)) == [0]


@pytest.mark.parametrize(
    ("share", "patches", "count"),
    [
        (0, 8, 0),
        (1, 8, 8),
        (0.15, 20, 3),
        (0.15, 576, 86),
        (0.1, 36, 3),
        (0.25, 3, 0),
        (0.29, 100, 29),
    ],
)
def test_the_share_of_patches_is_rounded_down(share: float, patches: int, count: int) -> None:
    """0.29 * 100 is a little less than 29 in floating point."""
    assert int(top(torch.arange(float(patches)), share).sum()) == count


def test_quartiles_are_those_of_numpy() -> None:
    draw = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 5, 8, 37):
        scores = torch.randn(size, dtype=torch.float64, generator=draw) ** 3
        first, third = np.quantile(scores.numpy(), [0.25, 0.75])
        expected = scores > third + 1.5 * (third - first)
        assert torch.equal(outliers(scores), expected)


def test_equal_scores_have_no_outlier() -> None:
    assert not outliers(torch.ones(9)).any()


def test_the_summary_set_comes_first() -> None:
    scores = tensor([0, 0, 0, 0, 0, 0, 1, 9])
    local, summary = token_sets(scores, scores, 0.25, scores.flip(0), 0.25)
    assert places(summary) == [6, 7]
    assert places(local) == [0, 1]


def test_scores_rise_and_never_pass_zero() -> None:
    scores = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for alpha in (0.0, 0.3, 1.0):
        moved = raised(scores, torch.full_like(scores, alpha))
        assert (moved >= scores).all()
        assert (moved[scores <= 0] <= 0).all()
        assert torch.equal(
            moved == scores, (scores == 0) | torch.full_like(scores == 0, alpha == 0)
        )


# ---- defaults


def facts(depth: int, softmax: tuple[int, ...] | None = None) -> ModelInfo:
    return ModelInfo(depth, 64, 4, {}, softmax)


@pytest.mark.parametrize(
    ("depth", "softmax", "layers"),
    [(32, None, range(2, 32)), (2, None, [1]), (1, None, [0]), (8, (1, 3, 7), [3, 7])],
)
def test_it_acts_in_all_blocks_but_the_first_two(depth: int, softmax: Any, layers: Any) -> None:
    fitted, notes = PAINT().resolve(facts(depth, softmax))
    assert list(fitted.default_layers(depth)) == list(layers)
    assert notes == []


def test_published_settings() -> None:
    assert (PAINT().alpha, PAINT().beta, PAINT().rho) == (0.7, 0.4, 0.15)
    assert PAINT().gamma == 1.0
    assert PAINT.paper() == PAINT(0.7, 0.4, 0.25, gamma=1.1)
    assert PAINT.release() == PAINT(0.7, 0.3, 0.25, semantics="release", gamma=1.1)


def test_a_table_for_another_model() -> None:
    text = "PAINT sensitivity: found 1 layers of 2 heads, this model has 32 of 4"
    with pytest.raises(ValueError, match=text):
        PAINT(sensitivity=[[1, 2]]).resolve(facts(32))


# ---- invariants


def run(model: nn.Module, *methods: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits `[B, S, V]` of a prompt, and what enters the output projection of every layer."""
    entering: list[Tensor] = []
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        for block in model.get_decoder().layers
    ]
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with torch.no_grad():
        if not methods:
            logits = model(**batch).logits
        else:
            with wrap(model, *methods):
                logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    return logits, entering


@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
def test_no_strength_is_the_stock_model_bit_for_bit(kind: str) -> None:
    model = tiny.plant(tiny.llava() if kind == "llava" else tiny.qwen2_vl())
    batch, ways = tiny.inputs(model, tiny.BATCH_OF_3), {"max_new_tokens": 3, "output_logits": True}
    stock = model.generate(**batch, **ways, return_dict_in_generate=True).logits
    with wrap(model, PAINT(0.0, 0.0, 1.0)):
        found = model.generate(**batch, **ways, return_dict_in_generate=True).logits
    assert torch.equal(run(model)[0], run(model, PAINT(0.0, 0.0, 1.0))[0])
    assert all(map(torch.equal, found, stock))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_rows_before_the_last_and_layers_below_are_untouched(attn: str) -> None:
    model = tiny.plant(tiny.llava(attn=attn))
    logits, entering = run(model)
    edited, after = run(model, PAINT(0.7, 0.4, 0.25, layers=(2, 3)))
    text = tiny.inputs(model, tiny.BATCH_OF_3)["attention_mask"].bool()[:, :-1]  # no padding
    assert torch.equal(edited[:, :-1][text], logits[:, :-1][text])
    assert not torch.equal(edited[:, -1], logits[:, -1])
    for layer, (one, other) in enumerate(zip(after, entering, strict=True)):
        assert torch.equal(one[:, :-1][text], other[:, :-1][text])
        assert torch.equal(one[:, -1], other[:, -1]) == (layer < 2)


def test_the_release_leaves_the_prompt_alone() -> None:
    model = tiny.plant(tiny.llava())
    assert torch.equal(run(model)[0], run(model, PAINT(semantics="release"))[0])


def test_all_patches_alike_is_pai(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha = beta and rho = 1: every image key z becomes z + alpha |z|, in the last row alone."""
    model = tiny.plant(tiny.llava())
    found, _ = run(model, PAINT(0.5, 0.5, 1.0, layers=(1, 2, 3)))
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    image = (batch["input_ids"] == tiny.IMAGE)[:, None, None]
    original = Call.scores

    def pai(call: Call, rows: Tensor) -> Tensor:
        scores = original(call, rows)
        if scores.shape[-1] != image.shape[-1]:  # of the vision tower
            return scores
        assert rows.tolist() == [scores.shape[-1] - 1]
        return torch.where(image, scores + 0.5 * scores.abs(), scores)

    monkeypatch.setattr(Call, "scores", pai)
    nothing = PAINT(0.5, 0.5, 0.0, layers=(1, 2, 3))
    monkeypatch.setattr(PAINT, "edit_scores", lambda self, layer, scores, forward, state: scores)
    expected, _ = run(model, nothing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_images_of_the_batch_do_not_meet() -> None:
    """A sample alone gives what it gives in a batch."""
    model = tiny.float64(tiny.plant(tiny.llava()))
    batch = tiny.inputs(model, tiny.MIXED_BATCH)
    batch["pixel_values"] = batch["pixel_values"].double()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with wrap(model, PAINT.paper()), torch.no_grad():
        together = model(**batch, position_ids=positions).logits[:, -1]
        alone = [model(**tiny.single(model, batch, row)).logits[0, -1] for row in range(4)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-10)


def test_a_head_without_sensitivity_is_stock() -> None:
    model = tiny.plant(tiny.llava())
    table = [[1.0, 0.0, 0.5, 0.0]] * 4
    _, stock = run(model)
    _, found = run(model, PAINT(layers=(1,), sensitivity=table))
    moved = (found[1] - stock[1])[:, -1].unflatten(-1, (4, -1)).abs().amax(-1) > 1e-5
    assert moved.tolist() == [[True, False, True, False]] * 3


def test_masked_keys_stay_masked() -> None:
    """Also where a method would raise them to 0, in a batch with padding."""

    class Loud(VAR):
        def edited_rows(self, forward: Any) -> Tensor:
            return forward.last

        def edit_scores(self, layer: int, scores: Tensor, *rest: Any) -> Tensor:
            return scores.new_zeros(scores.shape)

        def edit_weights(self, layer: int, weights: Tensor, *rest: Any) -> Tensor:
            seen.append(weights)
            return weights

    for attn in ("sdpa", "eager"):
        seen: list[Tensor] = []
        model = tiny.llava(attn=attn)
        batch = tiny.inputs(model, tiny.BATCH_OF_3)
        with wrap(model, Loud(dims=(3,))), torch.no_grad():
            model(**batch)
        kept = batch["attention_mask"].double()
        for weights in seen:
            expected = (kept / kept.sum(1, keepdim=True))[:, None, None].expand_as(weights)
            torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)
        assert seen
