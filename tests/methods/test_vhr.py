"""VHR's mathematics: worked examples, invariants, bounds and defaults."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.examples import EXAMPLES, PRECISIONS, assert_near, places, tensor
from vlm_patch import VHR
from vlm_patch.method import ForwardContext, ModelInfo, Position
from vlm_patch.methods.vhr import (
    HeadState,
    above_median,
    divergence,
    drop_outliers,
    without_image,
)

EXAMPLE = EXAMPLES["vhr"]
GUARDS = {"release": 1.0, "paper": None}


def outputs(scale: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Head outputs `[4, 2]` of the example with and without the image."""
    given, expected = EXAMPLE["shared"]["inputs"], EXAMPLE["shared"]["expected"]
    keys, queries = tensor(given["keys"], dtype), tensor(given["queries"], dtype)
    values, kept = tensor(given["values"], dtype) * scale, given["text_branch_keys"]
    scores = queries @ keys.T / 2**0.5
    full, text = scores.softmax(-1), scores[:, kept].softmax(-1)
    assert_near(full, expected["attention_full"])
    assert_near(text, expected["attention_text"])
    return (full[:, None] @ values)[:, 0], (text[:, None] @ values[:, kept])[:, 0]


# ---- worked examples


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["case_A", "case_B"])
def test_example_of_the_scores(name: str, dtype: torch.dtype) -> None:
    expected = EXAMPLE[name]["expected"]
    full, text = outputs(EXAMPLE[name]["value_scale"], dtype)
    euclid, squared = (divergence(full, text, squared) for squared in (False, True))
    assert_near(full, expected["full"])
    assert_near(text, expected["text"])
    assert_near(euclid, expected["vhd"])
    assert_near(squared, expected["vhd_squared"], atol=1e-5 if dtype == torch.float32 else None)
    for scores, rule, guard in (
        (squared, "release", 1.0),
        (euclid, "paper_ddof1", None),
    ):
        left = drop_outliers(scores, text, guard)
        assert_near(left, expected["rules"][rule]["scores"])
        assert places(above_median(left)) == expected["rules"][rule]["heads"]
        assert_near(left.median(), expected["rules"][rule]["lower_median"])
    assert places(above_median(euclid)) == expected["heads_without_filter"]


@pytest.mark.parametrize("dtype", [*PRECISIONS, torch.float16], ids=str)
@pytest.mark.parametrize("semantics", ["release", "paper"])
@pytest.mark.parametrize("name", ["case_A", "case_B"])
def test_example_of_the_choice(name: str, semantics: str, dtype: torch.dtype) -> None:
    expected = EXAMPLE[name]["expected"]
    full, text = (part.to(dtype)[None] for part in outputs(EXAMPLE[name]["value_scale"]))
    chosen = VHR(semantics=semantics).choose(full, text)[0]
    assert places(chosen) == expected["after_alpha2"][semantics]["heads"]
    unfiltered = VHR(semantics=semantics, filter=False).choose(full, text)[0]
    assert places(unfiltered) == expected["heads_without_filter"]


@pytest.mark.parametrize("semantics", ["release", "paper"])
@pytest.mark.parametrize("name", ["case_A", "case_B"])
def test_example_of_reinforcement(name: str, semantics: str) -> None:
    expected = EXAMPLE[name]["expected"]
    after = expected["after_alpha2"][semantics]
    full, text = outputs(EXAMPLE[name]["value_scale"])
    method, state = VHR(semantics=semantics), HeadState({0: text[None]})
    output = torch.stack([0.5 * full, full])[None]  # two rows; the last one decides
    gain = method.edit_heads(0, output, forward_of(2), state)
    assert gain is not None
    result = (output * gain[:, None, :, None])[0]
    assert_near(result[1].flatten(), after["concat"])
    assert_near(result[1].sum(0), after["sum"])
    assert_near(2 * result[0].flatten(), after["concat"])
    selected = full[places(method.choose(full[None], text[None])[0])].sum(0)
    for total, key in ((full.sum(0), "cosine_before"), (result[1].sum(0), "cosine_after")):
        assert_near(torch.cosine_similarity(total, selected, dim=0), after[key])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_distance_and_std_conventions(dtype: torch.dtype) -> None:
    """The library's divisor is H - 1, in both semantics."""
    given, expected = EXAMPLE["case_C"]["inputs"], EXAMPLE["case_C"]["expected"]
    euclid = tensor(given["vhd"], dtype)
    text = tensor(given["text_activation"], dtype).sqrt()[:, None]  # as outputs of width 1
    for scores, guard, rule in (
        (euclid, None, "euclid_ddof1"),
        (euclid**2, 1.0, "squared_ddof1_release"),
    ):
        left = drop_outliers(scores, text, guard)
        assert_near(left, expected[rule]["scores"])
        assert places(above_median(left)) == expected[rule]["heads"]


# ---- invariants


def forward_of(rows: int, seen: tuple[bool, ...] = (True,)) -> ForwardContext:
    """A prompt of `rows` tokens, of which the second is the image where one is `seen`."""
    true = torch.ones(len(seen), rows, dtype=torch.bool)
    image = torch.zeros_like(true)
    image[:, 1] = torch.tensor(seen)
    return ForwardContext(
        position=Position(prompt_rows=rows, first_prompt=True, starts=True),
        image=image,
        query=~image,
        content=~image,
        valid=true,
        text=true,
        last=true,
        seen=torch.tensor(seen),
        reading=True,
        inputs={},
    )


def random_outputs(seed: int, heads: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(3, heads, 1, generator=generator, dtype=torch.float64) * 4
    full, text = (
        torch.randn(3, heads, 5, generator=generator, dtype=torch.float64) * scale for _ in range(2)
    )
    return full, text


@pytest.mark.parametrize("seed", range(4))
def test_half_of_distinct_heads_are_chosen_and_a_batch_equals_its_samples(seed: int) -> None:
    full, text = random_outputs(seed)
    for semantics in GUARDS:
        method = VHR(semantics=semantics)
        chosen = method.choose(full, text)
        assert chosen.sum(1).tolist() == [4, 4, 4]
        for sample in range(3):
            alone = method.choose(full[sample : sample + 1], text[sample : sample + 1])
            assert torch.equal(chosen[sample : sample + 1], alone)


@pytest.mark.parametrize("seed", range(4))
def test_the_paper_is_free_of_scale_and_the_release_is_not(seed: int) -> None:
    full, text = random_outputs(seed)
    paper = [VHR(semantics="paper").choose(full * s, text * s) for s in (1.0, 1e-3, 1e3)]
    assert torch.equal(paper[0], paper[1])
    assert torch.equal(paper[0], paper[2])
    tiny = VHR().choose(full * 1e-3, text * 1e-3)
    assert torch.equal(tiny, VHR(filter=False).choose(full, text))


@pytest.mark.filterwarnings("ignore:std")
def test_equal_scores_choose_no_head() -> None:
    assert not above_median(torch.zeros(2, 4)).any()
    full, _ = random_outputs(0)
    assert not VHR().choose(full, full).any()
    assert not VHR().choose(full[:, :1], full[:, :1] + 1).any()  # a single head


def test_strictly_above_the_median() -> None:
    assert places(above_median(tensor([1.0, 2.0, 2.0, 3.0]))) == [3]
    assert places(above_median(tensor([1.0, 2.0, 3.0]))) == [2]
    assert places(above_median(tensor([0.0, 0.0, 0.0, 1.0]))) == [3]


def test_an_outlier_gives_its_place_to_the_next_head() -> None:
    scores = tensor([9.0, 3.0, 2.0, 1.0])
    strong, weak = tensor([[9.0], [0.1], [0.1], [0.1]]), tensor([[1.0]] * 4)
    assert_near(drop_outliers(scores, strong, None), [0.0, 3.0, 2.0, 1.0])
    assert places(above_median(drop_outliers(scores, strong, None))) == [1, 2]
    assert torch.equal(drop_outliers(scores, weak, None), scores)  # both must stick out
    calm = tensor([3.2, 3.0, 2.0, 1.0])
    assert torch.equal(drop_outliers(calm, strong, None), calm)


def test_the_guard_is_strict() -> None:
    """The release filters only where the spread of the scores exceeds 1."""
    text = tensor([[9.0], [0.1], [0.1]])
    scores = tensor([math.sqrt(3.0), 0.0, 0.0])  # spread of exactly 1 with divisor 2
    assert scores.std().item() == pytest.approx(1.0)
    wider, narrower = 1.001 * scores, 0.999 * scores
    assert drop_outliers(wider, text, 1.0)[0] == 0
    assert torch.equal(drop_outliers(narrower, text, 1.0), narrower)


def test_half_precision_does_not_overflow() -> None:
    """200 squared is beyond float16 once summed over 128 channels."""
    full = torch.zeros(1, 4, 128, dtype=torch.float16)
    for head in range(4):
        full[0, head] = 50.0 * head
    text = torch.zeros_like(full)
    assert places(VHR(filter=False).choose(full, text)[0]) == [2, 3]


def test_samples_without_an_image_keep_gain_1() -> None:
    full, text = random_outputs(1)
    gain = VHR(alpha=3.0).edit_heads(
        0,
        full[:, None].expand(-1, 4, -1, -1),
        forward_of(4, (True, False, True)),
        HeadState({0: text}),
    )
    assert gain is not None
    assert gain[1].tolist() == [1.0] * 8
    assert sorted(gain[0].tolist()) == [1.0] * 4 + [3.0] * 4


def test_heads_are_kept_for_the_generation() -> None:
    full, text = random_outputs(2)
    method, state, forward = VHR(), HeadState({5: text}), forward_of(4, (True,) * 3)
    first = method.edit_heads(5, full[:, None].expand(-1, 4, -1, -1), forward, state)
    assert first is not None
    assert torch.equal(first, method.edit_heads(5, 100 * text[:, None], forward, state))


def test_the_text_branch_is_the_prompt_without_image_tokens() -> None:
    """Different amounts of image and padding: left-padded again, positions from 0."""
    forward = forward_of(6, (True, True, False))
    forward.image[0, 1:4] = True
    forward.valid[1, 0] = False
    forward.inputs["inputs_embeds"] = torch.arange(18.0).view(3, 6, 1)
    found = without_image(forward)
    assert found["attention_mask"].tolist() == [
        [0, 0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert found["inputs_embeds"][0, 3:, 0].tolist() == [0.0, 4.0, 5.0]
    assert found["inputs_embeds"][1, 2:, 0].tolist() == [8.0, 9.0, 10.0, 11.0]
    assert found["inputs_embeds"][2, :, 0].tolist() == [12.0, 13.0, 14.0, 15.0, 16.0, 17.0]
    assert found["position_ids"].tolist() == [
        [0, 0, 0, 0, 1, 2],
        [0, 0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
    ]


# ---- bounds


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, True, "2", None])
def test_alpha(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"^VHR alpha: found .*, expected a finite number$"):
        VHR(alpha=alpha)


@pytest.mark.parametrize(("layers", "found"), [((-1,), "-1"), ([1.5], "1.5"), ([True], "True")])
def test_layers_are_whole_numbers(layers: Any, found: str) -> None:
    message = f"VHR layers: found {found}, expected an integer of at least 0"
    with pytest.raises(ValueError, match=message):
        VHR(layers=layers)


@pytest.mark.parametrize("layers", [5, "1-3"])
def test_layers_are_a_list(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"VHR layers: found .*, expected a list or a range"):
        VHR(layers=layers)


@pytest.mark.parametrize("semantics", ["Release", "", None, 2])
def test_semantics(semantics: Any) -> None:
    with pytest.raises(ValueError, match=r'VHR semantics: found .*, expected "release" or "paper"'):
        VHR(semantics=semantics)


def test_layers_of_the_model() -> None:
    with pytest.raises(ValueError, match="VHR layers: found 4, but this model has only 0 to 3"):
        VHR(layers=(1, 4)).resolve(ModelInfo(4, 64, 4, {}))


# ---- defaults


def test_published_defaults() -> None:
    method = VHR()
    assert (method.alpha, method.layers, method.filter, method.semantics) == (
        2.0,
        None,
        True,
        "release",
    )


def test_layers_come_from_the_profile_unless_given() -> None:
    facts = ModelInfo(32, 4096, 32, {"layers": (1, *range(18, 32))})
    found, notes = VHR().resolve(facts)
    assert list(found.default_layers(32)) == [1, *range(18, 32)]
    assert notes == []
    found, notes = VHR(layers=[2]).resolve(facts)
    assert list(found.default_layers(32)) == [2]
    assert notes == []


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (32, [1, *range(18, 32)]),
        (40, [1, *range(22, 40)]),
        (28, [1, *range(16, 28)]),
        (8, [1, *range(4, 8)]),
        (4, [1, 2, 3]),
        (1, [0]),
    ],
)
def test_without_a_profile_the_depth_is_scaled_and_said(depth: int, layers: list[int]) -> None:
    """The second layer and the last 14 of 32."""
    found, notes = VHR().resolve(ModelInfo(depth, 64, 4, {}))
    assert list(found.default_layers(depth)) == layers
    assert notes == [f"VHR layers={layers}"]


def test_the_filter_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="VHR filter: found 'no', expected True or False"):
        VHR(filter="no")
