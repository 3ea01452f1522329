"""VAR's mathematics: worked examples, invariants, bounds and defaults."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_patch
from eval.support import tiny
from tests.support.examples import EXAMPLES, PRECISIONS, assert_near, mask, places, tensor
from vlm_patch import VAR, PatchError
from vlm_patch.method import ForwardContext, ModelInfo, Position
from vlm_patch.methods.var import SinkState, key_groups, redistribute, sink_score
from vlm_patch.primitives.sink_rules import scaled_tau

GIVEN = EXAMPLES["var"]["redistribution"]["inputs"]
CASES = {case["name"]: case for case in EXAMPLES["var"]["redistribution"]["cases"]}
IMAGE = mask(GIVEN["image_keys"], 6)


def redistributed(weights: Tensor, image: Tensor, sinks: Tensor, **options: Any) -> Tensor:
    """`redistribute` for rows `[H, K]` of one sample and one query."""
    groups = key_groups(image[None], sinks[None])
    return redistribute(weights[None, :, None], groups, **options)[0, :, 0]


def case_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Weights `[2, 6]`, sinks `[6]` and the options of one case."""
    case = CASES[name]
    wanted = ("move_fraction", "rho_nonsink", "min_image_mass", "require_visual_sink")
    options = {field: case[field] for field in wanted} | {"release": case["semantics"] == "release"}
    return tensor(GIVEN["attention"], dtype), mask(case["sinks"], 6), options


# ---- worked examples


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_phi(dtype: torch.dtype) -> None:
    example = EXAMPLES["var"]["phi"]
    given, expected = example["inputs"], example["expected"]
    hidden = tensor(given["x"], dtype)
    score = sink_score(hidden, given["dims"], given["eps"])
    assert_near(score, expected["phi"])
    assert_near(sink_score(hidden, range(8)), expected["max_over_all_channels"])
    sinks, image = score >= given["tau"], mask(given["image_keys"], 6)
    assert places(sinks) == expected["sinks"]
    visual, sink, rest, everything = key_groups(image[None], sinks[None])[0].bool()
    assert places(visual) == given["image_keys"]
    assert places(visual & sink) == expected["visual_sinks"]
    assert places(rest) == expected["non_sink_visual"]
    assert everything.all()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_example_of_redistribution(name: str, dtype: torch.dtype) -> None:
    weights, sinks, options = case_of(name, dtype)
    expected = CASES[name]["expected"]
    edited = redistributed(weights, IMAGE, sinks, **options)
    assert_near(edited, expected["attention"])
    for head, wanted in enumerate(expected["heads"]):
        if wanted["selected"]:
            gained = edited[head] / weights[head]
            assert_near(gained[IMAGE & ~sinks], [wanted["gain"]] * int((IMAGE & ~sinks).sum()))
            lost = (weights[head] - edited[head])[sinks].sum()
            assert_near(lost, wanted["omega"])
        else:
            assert torch.equal(edited[head], weights[head])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_head_output(dtype: torch.dtype) -> None:
    example = EXAMPLES["var"]["head_output"]
    values, expected = tensor(example["inputs"]["values"], dtype), example["expected"]
    for name in ("paper_p0.6_rho0.5", "release_keep0.6_rho0.5"):
        weights, sinks, options = case_of(name, dtype)
        assert_near(weights @ values, expected["baseline"])
        assert_near(redistributed(weights, IMAGE, sinks, **options) @ values, expected[name])


def test_example_of_the_log_bias() -> None:
    """Mass is kept, so the edit is a softmax with a bias per key."""
    example = EXAMPLES["var"]["log_bias"]
    weights, sinks, options = case_of(example["inputs"]["case"])
    bias = (redistributed(weights, IMAGE, sinks, **options)[0] / weights[0]).log()
    assert_near(bias, example["expected"]["bias"])
    unnormalised = (weights[0].log() + bias).exp()
    assert_near(unnormalised.sum(), example["expected"]["partition"])
    assert_near((weights[0].log() + bias).softmax(-1), example["expected"]["attention"])


def test_example_in_float16_is_within_its_rounding() -> None:
    expected = EXAMPLES["var"]["release_fp16_head0_keep0.4"]
    weights, sinks, options = case_of("release_keep0.4_rho0.5", torch.float32)
    row = redistributed(weights, IMAGE, sinks, **options)[0]
    assert_near(row, expected["attention"], atol=2.0**-12)


def test_example_of_scaled_tau() -> None:
    for row in EXAMPLES["var"]["tau_scaled"]:
        assert_near(tensor(scaled_tau(row["hidden"])), row["tau"])


# ---- invariants of the score


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_the_score_is_at_most_the_root_of_the_width_and_free_of_scale(dtype: torch.dtype) -> None:
    hidden = torch.zeros(2, 64, dtype=dtype)
    hidden[0, 3] = -7.0
    hidden[1] = 2.0
    assert_near(sink_score(hidden, [3, 10]), [8.0, 1.0])
    noise = torch.randn(5, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    once, scaled = (sink_score(noise * factor, [3, 10]) for factor in (1.0, -1000.0))
    torch.testing.assert_close(once, scaled)


def test_a_zero_vector_scores_0() -> None:
    assert sink_score(torch.zeros(2, 8), [1, 5]).tolist() == [0.0, 0.0]


def test_eps_lowers_the_score_of_small_vectors_only() -> None:
    small, large = torch.full((8,), 1e-3), torch.full((8,), 1.0)
    assert_near(sink_score(small, [0], 1e-6), math.sqrt(0.5))
    assert_near(sink_score(large, [0], 1e-6), 1.0)


# ---- invariants of the redistribution


def random_rows(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[2, 4, 5, 12]`, image and sinks `[2, 12]`."""
    generator = torch.Generator().manual_seed(seed)
    weights = (3 * torch.randn(2, 4, 5, 12, generator=generator, dtype=dtype)).softmax(-1)
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[0, 2:9], image[1, 4:10] = True, True
    sinks = torch.rand(2, 12, generator=generator) < 0.3
    return weights, image, sinks


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_invariants(seed: int, release: bool) -> None:
    weights, image, sinks = random_rows(seed)
    edited = redistribute(weights, key_groups(image, sinks), 0.6, 0.3, 0.1, False, release)
    changed = (edited != weights).any(-1)
    assert 0 < changed.sum() < changed.numel()
    torch.testing.assert_close(edited.sum(-1), weights.sum(-1), rtol=0, atol=1e-14)
    assert (edited >= 0).all()
    for sample in range(2):
        others = ~image[sample] & ~sinks[sample]
        gainers = image[sample] & ~sinks[sample]
        assert torch.equal(edited[sample][..., others], weights[sample][..., others])
        share = [w[sample][..., gainers] for w in (weights, edited)]
        before, after = (part / part.sum(-1, keepdim=True) for part in share)
        torch.testing.assert_close(after, before)
        kept = (edited[sample] / weights[sample])[..., sinks[sample]]
        moved = changed[sample][..., None].expand_as(kept)
        torch.testing.assert_close(kept[moved], torch.full_like(kept[moved], 0.4))


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_equals_its_samples(seed: int) -> None:
    weights, image, sinks = random_rows(seed)
    together = redistribute(weights, key_groups(image, sinks), require_visual_sink=True)
    for sample in range(2):
        groups = key_groups(image[sample : sample + 1], sinks[sample : sample + 1])
        alone = redistribute(weights[sample : sample + 1], groups, require_visual_sink=True)
        assert torch.equal(together[sample], alone[0])


def test_the_whole_of_the_sinks_can_be_moved() -> None:
    weights, image, sinks = random_rows(0)
    edited = redistribute(weights, key_groups(image, sinks), 1.0, 0.0, 0.0)
    for sample in range(2):
        assert not edited[sample][..., sinks[sample]].any()
    torch.testing.assert_close(edited.sum(-1), weights.sum(-1))


def test_nothing_moved_is_nothing_changed() -> None:
    weights, image, sinks = random_rows(1)
    assert torch.equal(redistribute(weights, key_groups(image, sinks), 0.0, 0.0, 0.0), weights)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize(
    "row",
    [[0.5, 0.0, 0.0, 0.0, 0.0, 0.5], [0.2, 0.0, 0.8, 0.0, 0.0, 0.0], [0.0] * 6],
    ids=["no image mass", "no mass on gainers", "nothing at all"],
)
def test_guards_leave_the_row(row: list[float], release: bool) -> None:
    for dtype in PRECISIONS:
        weights, sinks = tensor([row], dtype), mask([0, 2], 6)
        edited = redistributed(
            weights, IMAGE, sinks, rho_nonsink=0.0, min_image_mass=0.0, release=release
        )
        assert torch.equal(edited, weights)


def test_without_a_visual_sink_bos_pays_unless_one_is_required() -> None:
    weights, sinks = tensor(GIVEN["attention"]), mask([0], 6)
    assert not torch.equal(redistributed(weights, IMAGE, sinks), weights)
    assert torch.equal(redistributed(weights, IMAGE, sinks, require_visual_sink=True), weights)


def test_thresholds_include_their_value() -> None:
    """Image mass and ratio at exactly the bound, in numbers that binary fractions hold."""
    weights, sinks = tensor([[0.25, 0.25, 0.25, 0.0, 0.0, 0.25]]), mask([0, 2], 6)
    at = redistributed(weights, IMAGE, sinks, rho_nonsink=0.5, min_image_mass=0.5)
    assert_near(at[0], [0.1, 0.55, 0.1, 0.0, 0.0, 0.25])
    for options in ({"rho_nonsink": 0.51}, {"min_image_mass": 0.51}):
        assert torch.equal(redistributed(weights, IMAGE, sinks, **options), weights)


def test_the_release_understates_the_sink_ratio_by_its_epsilon() -> None:
    """1e-6 per image token below the line: a row just over the bound is still taken."""
    image = mask(range(1, 101), 102)
    row = torch.zeros(1, 102, dtype=torch.float64)
    row[0, 1], row[0, 2], row[0, 101] = 0.25 + 1e-5, 0.25 - 1e-5, 0.5
    taken = [redistributed(row, image, mask([1], 102), release=r) for r in (False, True)]
    assert torch.equal(taken[0], row)
    assert not torch.equal(taken[1], row)


# ---- sinks, from block inputs


def acts(method: VAR, hidden: Tensor) -> bool:
    """Whether a row is edited where BOS, 4 image tokens and a text token enter layer 2 so."""
    true = torch.ones(1, 6, dtype=torch.bool)
    forward = ForwardContext(
        position=Position(prompt_rows=6, first_prompt=True, starts=True),
        image=IMAGE[None],
        query=true,
        content=true,
        valid=true,
        text=true,
        last=true,
        seen=true[:, 0],
        reading=True,
        inputs={},
    )
    weights, state = tensor(GIVEN["attention"])[None, :, None], SinkState()
    method.observe_hidden(2, hidden[None], forward, state)
    return not torch.equal(method.edit_weights(2, weights, forward, state), weights)


@pytest.mark.parametrize("scale", [1e4, 3.0])
def test_a_score_of_exactly_tau_is_a_sink_in_the_paper_only(scale: float) -> None:
    """phi >= tau without an epsilon, or phi > tau with one."""
    hidden = torch.ones(6, 64)
    hidden[2] = 0.0
    hidden[2, 3] = scale  # a score of 8, the root of the width
    assert acts(VAR(tau=8.0, dims=(3,)), hidden)
    assert not acts(VAR(tau=8.0, dims=(3,), semantics="release"), hidden)
    assert acts(VAR(tau=7.9, dims=(3,), semantics="release"), hidden)
    assert not acts(VAR(tau=8.01, dims=(3,)), hidden)


def test_scores_of_half_precision_streams_are_taken_in_float32() -> None:
    """The square of 300 is beyond float16."""
    hidden = torch.ones(6, 64, dtype=torch.float16)
    hidden[2] = 0.0
    hidden[2, 3] = 300.0
    assert acts(VAR(tau=8.0, dims=(3,)), hidden)


# ---- bounds


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (field, value, "a number from 0 to 1")
        for field in ("move_fraction", "rho_nonsink")
        for value in (-0.01, 1.01, math.nan, math.inf, True, "0.5", None, [0.5])
    ]
    + [
        ("min_image_mass", value, "a finite number of at least 0")
        for value in (-0.1, math.nan, math.inf, False, "a", None)
    ]
    + [
        ("tau", value, "a finite number above 0")
        for value in (0, 0.0, -1.0, math.nan, math.inf, True, "20")
    ]
    + [
        ("first_layer", value, "an integer of at least 0")
        for value in (-1, 1.0, True, "2", math.nan)
    ],
)
def test_bounds(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"VAR {field}: found .*, expected {expected}") as error:
        VAR(**{field: value})
    assert f"found {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("dims", "found"),
    [((-1,), "-1"), ((1.5,), "1.5"), ((True,), "True"), (["3"], "'3'")],
)
def test_channels_are_whole_numbers(dims: Any, found: str) -> None:
    message = f"VAR dims: found {found}, expected an integer of at least 0"
    with pytest.raises(ValueError, match=message):
        VAR(dims=dims)


@pytest.mark.parametrize("dims", [5, "14", tensor([1, 2])], ids=["number", "text", "tensor"])
def test_channels_are_a_list(dims: Any) -> None:
    with pytest.raises(ValueError, match=r"VAR dims: found .*, expected a list or a range"):
        VAR(dims=dims)


@pytest.mark.parametrize("semantics", ["Paper", "", None, 1])
def test_semantics(semantics: Any) -> None:
    with pytest.raises(ValueError, match=r'VAR semantics: found .*, expected "paper" or "release"'):
        VAR(semantics=semantics)


def test_the_ends_of_every_range_are_allowed() -> None:
    VAR(0, 0, 0, tau=1e-9, dims=(0,), first_layer=0)
    VAR(1.0, 1.0, 5.0, tau=1e9, dims=[], first_layer=100)


def test_channels_and_layers_of_the_model() -> None:
    facts = ModelInfo(4, 64, 4, {})
    VAR(dims=(63,), first_layer=3).resolve(facts)
    with pytest.raises(ValueError, match="VAR dims: found 64, but this model has only 0 to 63"):
        VAR(dims=(3, 64)).resolve(facts)
    with pytest.raises(ValueError, match=r"VAR first_layer: found 4, but .* only 0 to 3"):
        VAR(first_layer=4).resolve(facts)


# ---- defaults


def fitted(method: VAR, facts: ModelInfo) -> VAR:
    found, notes = method.resolve(facts)
    assert isinstance(found, VAR)
    assert notes == []
    return found


def test_published_defaults() -> None:
    method = VAR()
    assert (method.move_fraction, method.rho_nonsink, method.min_image_mass) == (0.6, 0.5, 0.2)
    assert (method.tau, method.dims, method.first_layer) == (None, None, None)
    assert (method.exclude_last_layer, method.require_visual_sink) == (True, False)
    assert method.semantics == "paper"


def test_tau_is_scaled_by_the_width() -> None:
    for row in EXAMPLES["var"]["tau_scaled"]:
        assert fitted(VAR(), ModelInfo(32, row["hidden"], 32, {})).tau is None  # to be measured
        found = fitted(VAR(dims=[3]), ModelInfo(32, row["hidden"], 32, {}))
        assert found.tau == pytest.approx(row["tau"], abs=1e-9)
    assert fitted(VAR(tau=7.0), ModelInfo(32, 1024, 8, {})).tau == 7.0


def test_channels_come_from_the_profile_unless_given() -> None:
    facts = ModelInfo(32, 4096, 32, {"dims": (1415, 2533)})
    assert fitted(VAR(), facts).dims == (1415, 2533)
    assert fitted(VAR(dims=[7]), facts).dims == (7,)
    assert fitted(VAR(), ModelInfo(32, 4096, 32, {})).dims is None


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, range(31)),
        ({"exclude_last_layer": False}, range(32)),
        ({"first_layer": 5}, range(5, 31)),
        ({"semantics": "release"}, range(2, 31)),
        ({"semantics": "release", "first_layer": 0}, range(2, 31)),
        ({"semantics": "release", "first_layer": 9, "exclude_last_layer": False}, range(9, 32)),
    ],
    ids=str,
)
def test_layers(options: dict[str, Any], layers: range) -> None:
    found = fitted(VAR(**options), ModelInfo(32, 4096, 32, {}))
    assert list(found.default_layers(32)) == list(layers)


# ---- on a model


def layer_tables(*layers: int) -> Tensor:
    table = torch.zeros(4, 4, dtype=torch.bool)
    table[list(layers)] = True
    return table


def test_release_semantics_refuses_the_first_two_layers() -> None:
    model = tiny.plant(tiny.llava())
    method = VAR(tau=3.0, dims=tiny.SINK_DIMS, semantics="release")
    with (
        vlm_patch.wrap(model, method, heads=layer_tables(1, 2)),
        pytest.raises(PatchError, match="never acts below layer 2, but layer 1 is on"),
        torch.no_grad(),
    ):
        model(**tiny.inputs(model))


def test_a_model_without_sinks_is_told_and_left_stock() -> None:
    """No channels known, none found: the reason, once, and the stock model."""
    model = tiny.llava()  # not planted
    batch = tiny.inputs(model)
    with torch.no_grad():
        stock = model(**batch).logits
    with vlm_patch.wrap(model, "var"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with torch.no_grad():
            found = [model(**batch).logits for _ in range(2)]
    assert all(torch.equal(logits, stock) for logits in found)
    assert len(said) == 1
    message = str(said[0].message)
    assert message.startswith("VAR does nothing on this model: no attention sink was found.")
    assert message.endswith("If you know its sink channels, pass VAR(dims=...).")


@pytest.mark.parametrize("name", ["exclude_last_layer", "require_visual_sink"])
def test_a_flag_is_true_or_false(name: str) -> None:
    with pytest.raises(ValueError, match=f"VAR {name}: found 'no', expected True or False"):
        VAR(**{name: "no"})


def test_no_sink_channel_is_no_silent_no_op() -> None:
    with pytest.warns(UserWarning, match=r"VAR\(dims=\(\)\) does nothing"):
        VAR(dims=()).resolve(ModelInfo(depth=4, width=64, heads=4, profile={}))
