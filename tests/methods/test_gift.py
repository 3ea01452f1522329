"""GIFT's mathematics: worked examples, invariants, bounds and defaults."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.examples import EXAMPLES, PRECISIONS, assert_near, mask, places, tensor
from vlm_patch import GIFT
from vlm_patch.method import ForwardContext, ModelInfo, Position
from vlm_patch.methods.gift import (
    GazeState,
    amplify,
    key_groups,
    positive_change,
    saliency_gain,
    top_heads,
)

EXAMPLE = EXAMPLES["gift"]


def gain_of(saliency: Tensor, alpha: float) -> Tensor:
    """`saliency_gain` where every key is an image token."""
    return saliency_gain(saliency, torch.ones_like(saliency, dtype=torch.bool), alpha)


def normalised(saliency: Tensor) -> Tensor:
    return gain_of(saliency, 1.0).log()


def edited(weights: Tensor, image: Tensor, query: Tensor, gain: Tensor, **options: float) -> Tensor:
    """`amplify` for weights `[B, H, R, K]` and masks and gain `[B, K]`."""
    return amplify(weights, key_groups(image, query, gain), **options)


def edited_row(
    rows: Tensor, image: Tensor, query: Tensor, gain: Tensor, **options: float
) -> Tensor:
    """The same for one row `[H, K]` of one sample."""
    return edited(rows[None, :, None], image[None], query[None], gain[None], **options)[0, :, 0]


# ---- worked examples


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_the_map(dtype: torch.dtype) -> None:
    given, expected = EXAMPLE["7.1"]["inputs"], EXAMPLE["7.1"]["expected"]
    change = positive_change(tensor(given["rows"], dtype))
    assert_near(change, expected["positive_change"])
    content = change[[row - 1 for row in given["content_rows"]]]
    cases = {
        "content": content.mean(0),
        "all_tokens": change.mean(0),
        "static_map": tensor(given["rows"], dtype)[given["content_rows"]].mean(0),
    }
    for name, saliency in cases.items():
        assert_near(saliency, expected[name]["saliency"])
        assert_near(normalised(saliency), expected[name]["normalised"])
    for alpha in (5, 2):
        gain = gain_of(cases["content"], alpha)
        wanted = tensor(expected[f"gain_alpha{alpha}"], dtype)
        rtol = 1e-5 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(gain, wanted, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("alpha", [5, 2])
def test_example_of_one_decode_step(alpha: int, dtype: torch.dtype) -> None:
    given = EXAMPLE["7.2"]["inputs"]
    expected = EXAMPLE["7.2"]["expected"][f"alpha{alpha}"]
    row = tensor(given["row"], dtype)[None]
    image, query = mask(given["visual_keys"], 8), mask(given["query_keys"], 8)
    gain = torch.ones(8, dtype=dtype)
    gain[image] = (alpha * tensor(given["normalised"], dtype)).exp()
    after = edited_row(row, image, query, gain, beta=given["beta"])[0]
    assert_near(after, expected["after"])
    for keys, name in ((image, "visual"), (query, "query"), (~image & ~query, "other")):
        assert_near(after[keys].sum(), expected[f"mass_{name}"])
    # the factor of a key that nothing boosts is 1 / Z; of a query key, r / Z
    assert_near(row[0, 7] / after[7], expected["Z"], atol=1e-4 if dtype == torch.float32 else 1e-8)
    if dtype == torch.float64:
        ratio = (after[4] / row[0, 4]) / (after[7] / row[0, 7])
        assert_near(ratio, expected["r"])
        bias = (after / row[0]).log() - (after[7] / row[0, 7]).log()
        assert_near(bias, expected["logit_bias"])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_four_heads(dtype: torch.dtype) -> None:
    given, expected = EXAMPLE["7.3"]["inputs"], EXAMPLE["7.3"]["expected"]
    rows = tensor(given["rows"], dtype)
    image, query = mask(given["visual_keys"], 8), mask(given["query_keys"], 8)
    for keys, name in ((image, "visual"), (query, "query")):
        mass = rows[:, keys].sum(-1)
        assert_near(mass, expected[f"{name}_mass"])
        assert places(top_heads(mass)) == expected[f"heads_{name}"]
    gain = torch.ones(8, dtype=dtype)
    gain[image] = (given["alpha"] * tensor(given["normalised"], dtype)).exp()
    after = edited_row(rows, image, query, gain, beta=given["beta"])
    assert_near(after, expected["after"])
    # in the head chosen for both, query keys over the untouched key have grown by r
    grown = (after[2, 4] / after[2, 7]) / (rows[2, 4] / rows[2, 7])
    assert_near(grown, expected["r"])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_the_clip(dtype: torch.dtype) -> None:
    given, expected = EXAMPLE["7.4"]["inputs"], EXAMPLE["7.4"]["expected"]
    found = normalised(tensor(given["saliency"], dtype))
    assert_near(found, expected["clipped"]["normalised"])
    assert (found - tensor(expected["without_clip"], dtype)).abs().max() > 0.02


# ---- invariants of the map


def test_fewer_than_11_image_tokens_are_never_clipped() -> None:
    """(n - 1) / sqrt(n) > 3 needs n >= 11, whatever the values."""
    for count in range(2, 14):
        spike = torch.zeros(count, dtype=torch.float64)
        spike[-1], spike[0] = 1.0, -1e-3
        plain = (spike - spike.min()) / (spike.max() - spike.min())
        clipped = (normalised(spike) - plain).abs().max() > 1e-9
        assert clipped == (count >= 11), count


def test_scale_and_place_of_a_map_do_not_matter() -> None:
    saliency = torch.rand(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gain_of(7.0 * saliency, 3.0), gain_of(saliency, 3.0))
    torch.testing.assert_close(gain_of(saliency + 0.1, 3.0), gain_of(saliency, 3.0))


@pytest.mark.parametrize("alpha", [3.0, -2.0])
def test_the_gain_spans_1_to_exp_alpha_on_the_image_and_is_1_elsewhere(alpha: float) -> None:
    generator = torch.Generator().manual_seed(1)
    saliency = torch.rand(4, 30, dtype=torch.float64, generator=generator)
    image = torch.zeros(4, 30, dtype=torch.bool)
    for sample in range(4):
        image[sample, 3 + sample : 20 - 2 * sample] = True
    gain = saliency_gain(saliency, image, alpha)
    assert (gain[~image] == 1).all()
    for sample in range(4):
        own = gain[sample, image[sample]]
        assert_near(own.log().abs().min(), 0.0)
        assert_near(own.log()[own.log().abs().argmax()], alpha)
        alone = gain_of(saliency[sample, image[sample]][None], alpha)[0]
        torch.testing.assert_close(own, alone)


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("count", [0, 1, 16])
def test_a_flat_map_changes_nothing(value: float, count: int) -> None:
    image = mask(range(count), 16)[None]
    gain = saliency_gain(torch.full((1, 16), value), image, 5.0)
    assert torch.equal(gain, torch.ones(1, 16))


def test_alpha_0_changes_nothing() -> None:
    saliency = torch.rand(1, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(gain_of(saliency, 0.0), torch.ones(1, 16))


def test_change_keeps_only_what_grows() -> None:
    rows = tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.4, 0.3, 0.3]])
    assert_near(positive_change(rows), [[0.0, 0.4, 0.0], [0.3, 0.0, 0.0]])
    assert positive_change(rows[:1]).shape == (0, 3)


# ---- invariants of the choice of heads


def test_ties_go_to_the_lowest_head() -> None:
    assert places(top_heads(tensor([1.0, 2.0, 2.0, 2.0]))) == [1, 2]
    assert places(top_heads(torch.zeros(6))) == [0, 1, 2]
    many = torch.zeros(3, 64)
    many[1, 40] = 1.0
    chosen = top_heads(many)
    assert places(chosen[0]) == list(range(32))
    assert places(chosen[1]) == [*range(31), 40]


@pytest.mark.parametrize(
    ("heads", "fraction", "count"),
    [(1, 0.5, 1), (3, 0.5, 1), (4, 0.5, 2), (5, 0.5, 2), (8, 0.0, 1), (8, 1.0, 8), (28, 0.5, 14)],
)
def test_how_many_heads(heads: int, fraction: float, count: int) -> None:
    mass = torch.arange(float(heads))
    assert places(top_heads(mass, fraction)) == list(range(heads - count, heads))


# ---- invariants of the amplification


def random_rows(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights `[2, 6, 3, 20]`; image, query and gain `[2, 20]`."""
    generator = torch.Generator().manual_seed(seed)
    weights = (2 * torch.randn(2, 6, 3, 20, generator=generator, dtype=torch.float64)).softmax(-1)
    image, query = torch.zeros(2, 2, 20, dtype=torch.bool)
    image[0, 1:12], image[1, 4:9] = True, True
    query[0, 13:17], query[1, 10:18] = True, True
    saliency = torch.rand(2, 20, generator=generator, dtype=torch.float64)
    return weights, image, query, saliency_gain(saliency, image, 3.0)


@pytest.mark.parametrize("seed", range(3))
def test_every_row_sums_to_1(seed: int) -> None:
    weights, image, query, gain = random_rows(seed)
    after = edited(weights, image, query, gain, beta=0.7, head_fraction=0.3)
    torch.testing.assert_close(after.sum(-1), torch.ones(2, 6, 3, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_no_gain_and_beta_1_is_the_identity(seed: int) -> None:
    weights, image, query, gain = random_rows(seed)
    after = edited(weights, image, query, torch.ones_like(gain))
    torch.testing.assert_close(after, weights, rtol=0, atol=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_heads_in_neither_set_are_bit_identical(seed: int) -> None:
    weights, image, query, gain = random_rows(seed)
    after = edited(weights, image, query, gain, head_fraction=1 / 6)
    for sample in range(2):
        for row in range(3):
            rows = weights[sample, :, row]
            chosen = {int(rows[:, keys[sample]].sum(-1).argmax()) for keys in (image, query)}
            same = [torch.equal(after[sample, head, row], rows[head]) for head in range(6)]
            assert {head for head in range(6) if not same[head]} == chosen


def test_one_head_in_both_sets_keeps_the_ratio_of_image_to_question() -> None:
    weights, image, query, gain = random_rows(0)
    weights, (image, query, gain) = weights[:1, :1], (m[:1] for m in (image, query, gain))
    after = edited(weights, image, query, gain)
    before_ratio, after_ratio = (
        w[..., image[0]].sum(-1) / w[..., query[0]].sum(-1) for w in (weights, after)
    )
    torch.testing.assert_close(after_ratio, before_ratio)
    assert (after[..., image[0]].sum(-1) > weights[..., image[0]].sum(-1)).all()
    doubled = edited(weights, image, query, gain, beta=2.0)
    ratio = doubled[..., image[0]].sum(-1) / doubled[..., query[0]].sum(-1)
    torch.testing.assert_close(ratio, before_ratio / 2)


def test_beta_0_empties_the_question() -> None:
    """It is not "visual only": specs/gift.md, decision 19."""
    weights, image, query, gain = random_rows(1)
    after = edited(weights, image, query, gain, beta=0.0, head_fraction=1.0)
    assert not after[query[:, None, None].expand_as(after)].any()


@pytest.mark.parametrize("head_fraction", [0.3, 0.5, 1.0])
def test_a_batch_and_its_rows_are_independent(head_fraction: float) -> None:
    weights, image, query, gain = random_rows(2)
    together = edited(weights, image, query, gain, head_fraction=head_fraction)
    for sample in range(2):
        for row in range(3):
            alone = edited(
                weights[sample : sample + 1, :, row : row + 1],
                image[sample : sample + 1],
                query[sample : sample + 1],
                gain[sample : sample + 1],
                head_fraction=head_fraction,
            )
            torch.testing.assert_close(together[sample, :, row], alone[0, :, 0])


def test_guards() -> None:
    """No image mass: r is 1. Nothing left of a row: it stays."""
    image, query, gain = mask([1, 2], 5), mask([3], 5), torch.tensor([1.0, 9.0, 2.0, 1.0, 1.0])
    blind = torch.tensor([[0.5, 0.0, 0.0, 0.3, 0.2]])
    torch.testing.assert_close(edited_row(blind, image, query, gain), blind)
    asked = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    assert torch.equal(edited_row(asked, image, query, gain, beta=0.0), asked)
    assert torch.equal(edited_row(torch.zeros(1, 5), image, query, gain), torch.zeros(1, 5))


# ---- how the map is collected


def reading(content: Tensor, image: Tensor) -> ForwardContext:
    """The forward of a prompt with these masks `[B, S]`."""
    true = torch.ones_like(image)
    return ForwardContext(
        position=Position(prompt_rows=image.shape[1], first_prompt=True, starts=True),
        image=image,
        query=content,
        content=content,
        valid=true,
        text=true,
        last=true,
        seen=image.any(1),
        reading=True,
        inputs={},
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rows_shown_in_chunks_give_the_same_map(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, 4, 16, 16, generator=generator, dtype=torch.float64).softmax(-1)
    image = torch.zeros(3, 16, dtype=torch.bool)
    image[:, 1:6] = True
    content = (torch.rand(3, 16, generator=generator) < 0.5) & ~image
    content[:, 0], content[:, 12] = False, True
    forward, method = reading(content, image), GIFT(2.0, saliency_layer=0, layers=(1,))
    watched = method.watched_rows(forward)
    assert watched is not None
    assert watched[0] == (0,)
    rows = places(watched[1].any(0))
    answer = torch.rand(3, 4, 1, 16, generator=generator, dtype=torch.float64).softmax(-1)
    found = []
    for step in (len(rows), size):
        state = GazeState()
        for chunk in torch.tensor(rows).split(step):
            method.observe(0, weights[:, :, chunk], chunk, forward, state)
        found.append(method.edit_weights(1, answer, forward, state))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)
    gain = torch.ones(3, 16, dtype=torch.float64)
    for sample in range(3):
        change = positive_change(weights[sample])[:, places(content[sample, 1:])]
        change = change[..., image[sample]]
        kept = top_heads(change.sum((1, 2)))
        gain[sample, image[sample]] = gain_of(change[kept].mean((0, 1)), 2.0)
    torch.testing.assert_close(found[0], edited(answer, image, content, gain))


def test_several_saliency_layers_make_one_map_each_with_heads_of_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(2, 1, 4, 16, 16, generator=generator, dtype=torch.float64).softmax(-1)
    image, content = mask(range(1, 6), 16), mask([8, 9, 13], 16)
    forward, method = reading(content[None], image[None]), GIFT(2.0, saliency_layer=[3, 0])
    watched = method.watched_rows(forward)
    assert watched is not None
    assert watched[0] == (3, 0)
    rows = watched[1][0].nonzero().flatten()
    state = GazeState()
    for layer, of_layer in zip((0, 3), weights, strict=True):
        method.observe(layer, of_layer[:, :, rows], rows, forward, state)
    answer = torch.rand(1, 4, 1, 16, generator=generator, dtype=torch.float64).softmax(-1)
    found = method.edit_weights(1, answer, forward, state)
    change = positive_change(weights[:, 0])[..., places(content[1:]), :][..., image]
    kept = top_heads(change.sum((2, 3)))
    assert not torch.equal(kept[0], kept[1])
    gain = torch.ones(1, 16, dtype=torch.float64)
    gain[0, image] = gain_of(change[kept].mean((0, 1)), 2.0)
    torch.testing.assert_close(found, edited(answer, image[None], content[None], gain))


# ---- bounds


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("alpha", value, "a finite number") for value in (math.nan, math.inf, True, "5", [5.0])]
    + [
        ("beta", value, "a finite number of at least 0")
        for value in (-0.1, math.nan, math.inf, False, None)
    ]
    + [
        ("head_fraction", value, "a number from 0 to 1")
        for value in (-0.1, 1.1, math.nan, True, "half", None)
    ]
    + [("saliency_layer", value, "an integer of at least 0") for value in (-1, 1.5, True, "3")],
)
def test_bounds(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^GIFT {field}: found .*, expected {expected}$") as error:
        GIFT(**{field: value})
    assert f"found {value!r}" in str(error.value)


def test_alpha_whose_exponential_float32_cannot_hold() -> None:
    """Up to the bound the pooled mass of 128 heads is finite; beyond, rows would stay as they are
    without a word.
    """
    with pytest.raises(ValueError, match=r"^GIFT alpha: found 81, expected at most 80, since"):
        GIFT(alpha=81)
    GIFT(alpha=-1000.0)
    weights, image, query, _ = (part[:1].float() for part in random_rows(0))
    weights = weights[:, :1].repeat(1, 128, 1, 1)
    gain = saliency_gain(torch.arange(20.0)[None], image.bool(), GIFT(alpha=80.0).alpha or 0.0)
    after = edited(weights, image.bool(), query.bool(), gain, head_fraction=1.0)
    brightest = places(image[0])[-1]
    torch.testing.assert_close(after.sum(-1), torch.ones(1, 128, 3))
    assert (after[..., image[0].bool()].argmax(-1) == brightest - places(image[0])[0]).all()


@pytest.mark.parametrize(("layers", "found"), [((-1,), "-1"), ([1.5], "1.5"), ([2, True], "True")])
def test_layers_are_whole_numbers(layers: Any, found: str) -> None:
    message = f"GIFT layers: found {found}, expected an integer of at least 0"
    with pytest.raises(ValueError, match=message):
        GIFT(layers=layers)


@pytest.mark.parametrize("layers", [5, "1-3"])
def test_layers_are_a_list(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"GIFT layers: found .*, expected a list or a range"):
        GIFT(layers=layers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"found \[\], expected a layer, or a list of at least one layer with none of them"),
        ((2, 3, 2), r"found \(2, 3, 2\), expected a layer, or a list of at least one"),
        ([1, -1], "found -1, expected an integer of at least 0"),
        ((True,), "found True, expected an integer of at least 0"),
        ([[1]], r"found \[1\], expected an integer of at least 0"),
    ],
)
def test_saliency_layers_are_different_layers(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^GIFT saliency_layer: {message}"):
        GIFT(saliency_layer=given)


def test_words() -> None:
    for words in ("nouns", None, 3, True, ["content"]):
        with pytest.raises(ValueError, match=r'expected "content", "spacy", "all" or a mask'):
            GIFT(words=words)
    for bad in (torch.ones(1, 5), torch.ones(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"expected a bool mask \[batch, prompt length\]"):
            GIFT(words=bad)
    GIFT(words=torch.ones(1, 5, dtype=torch.bool))


def test_layers_of_the_model() -> None:
    facts = ModelInfo(4, 64, 4, {})
    with pytest.raises(ValueError, match="GIFT layers: found 4, but this model has only 0 to 3"):
        GIFT(1.0, saliency_layer=0, layers=(1, 4)).resolve(facts)
    with pytest.raises(ValueError, match=r"GIFT saliency_layer: found 9, but .* has only 0 to 3"):
        GIFT(1.0, saliency_layer=9, layers=(1,)).resolve(facts)
    with pytest.raises(ValueError, match=r"GIFT saliency_layer: found 9, but .* has only 0 to 3"):
        GIFT(1.0, saliency_layer=[0, 9], layers=(1,)).resolve(facts)
    hybrid = ModelInfo(4, 64, 4, {}, softmax=(1, 3))
    with pytest.raises(ValueError, match="saliency_layer: found 2, a layer without softmax"):
        GIFT(1.0, saliency_layer=[1, 2], layers=(3,)).resolve(hybrid)


# ---- defaults


def fitted(method: GIFT, facts: ModelInfo) -> tuple[GIFT, list[str]]:
    found, notes = method.resolve(facts)
    assert isinstance(found, GIFT)
    return found, notes


def test_published_defaults() -> None:
    method = GIFT()
    assert (method.beta, method.head_fraction, method.words) == (1.0, 0.5, "content")
    assert (method.alpha, method.saliency_layer, method.layers) == (None, None, None)


def test_values_come_from_the_profile_unless_given() -> None:
    profile = {"alpha": 5.0, "saliency_layer": 11, "layers": tuple(range(12, 23))}
    found, notes = fitted(GIFT(), ModelInfo(32, 4096, 32, profile))
    assert (found.alpha, found.saliency_layer, found.layers) == (5.0, 11, tuple(range(12, 23)))
    assert notes == []
    assert list(found.default_layers(32)) == list(range(12, 23))
    found, notes = fitted(GIFT(alpha=0.0, layers=[3]), ModelInfo(32, 4096, 32, profile))
    assert (found.alpha, found.saliency_layer, found.layers) == (0.0, 11, [3])
    assert notes == []


@pytest.mark.parametrize(
    ("depth", "layers", "saliency_layer"),
    [(36, range(12, 24), 11), (6, range(2, 4), 1), (4, range(1, 2), 0), (2, range(1, 2), 0)],
)
def test_without_a_profile_the_middle_third_is_taken_and_said(
    depth: int, layers: range, saliency_layer: int
) -> None:
    """specs/gift.md, decision 20: alpha 4, the middle third."""
    found, notes = fitted(GIFT(), ModelInfo(depth, 64, 4, {}))
    assert (found.alpha, found.layers) == (4.0, tuple(layers))
    assert found.saliency_layer == saliency_layer
    assert set(notes) == {
        "GIFT alpha=4.0",
        f"GIFT saliency_layer={saliency_layer}",
        f"GIFT layers={tuple(layers)}",
    }
    _, notes = fitted(GIFT(alpha=1.0, layers=(1,)), ModelInfo(depth, 64, 4, {}))
    assert notes == [f"GIFT saliency_layer={saliency_layer}"]
