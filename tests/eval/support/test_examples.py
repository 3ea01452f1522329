"""The worked examples of the specifications, through the reference's own functions."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.support.reference import gift, paint, var, vhr
from eval.support.reference.gift import Gift
from eval.support.reference.paint import Paint
from eval.support.reference.var import Var
from eval.support.reference.vhr import Vhr
from tests.support import sink_search

EXAMPLES = json.loads(
    (Path(__file__).parents[2] / "data" / "worked_examples.json").read_text(encoding="utf-8")
)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask(places: list[int], length: int) -> Tensor:
    found = torch.zeros(length, dtype=torch.bool)
    found[places] = True
    return found


def assert_near(actual: object, expected: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), tensor(expected), rtol=0, atol=atol
    )


# ---- worked examples: VAR


def test_example_of_phi() -> None:
    example = EXAMPLES["var"]["phi"]
    given, expected = example["inputs"], example["expected"]
    x, dims = tensor(given["x"]), tuple(given["dims"])
    assert_near(x.square().mean(-1).sqrt(), expected["rms"])
    assert_near(var.phi(x, dims), expected["phi"])
    assert_near(var.phi(x, tuple(range(8))), expected["max_over_all_channels"])
    flags = var.is_sink(x, Var(dims, given["tau"]), torch.ones(6, dtype=torch.bool))
    image = mask(given["image_keys"], 6)
    assert flags.nonzero().flatten().tolist() == expected["sinks"]
    assert (flags & image).nonzero().flatten().tolist() == expected["visual_sinks"]
    assert (~flags & image).nonzero().flatten().tolist() == expected["non_sink_visual"]


CASES = {case["name"]: case for case in EXAMPLES["var"]["redistribution"]["cases"]}


def redistribution(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Var]:
    """Weights [2, 6], sinks [6] and the method of one case."""
    case, given = CASES[name], EXAMPLES["var"]["redistribution"]["inputs"]
    wanted = ("move_fraction", "rho_nonsink", "min_image_mass", "require_visual_sink", "semantics")
    spec = Var(dims=(0,), tau=2.0, **{field: case[field] for field in wanted})
    return tensor(given["attention"]).to(dtype), mask(case["sinks"], 6), spec


IMAGE_KEYS = mask(EXAMPLES["var"]["redistribution"]["inputs"]["image_keys"], 6)


@pytest.mark.parametrize("name", CASES)
def test_example_of_redistribution(name: str) -> None:
    weights, flags, spec = redistribution(name)
    expected = CASES[name]["expected"]
    edited = var.redistributed(weights, IMAGE_KEYS, flags, spec)
    assert_near(edited, expected["attention"])
    assert_near(edited.sum(-1), [1.0, 1.0])
    chosen = var.selected(weights, IMAGE_KEYS, flags, spec)
    for head, wanted in enumerate(expected["heads"]):
        row = weights[head]
        assert_near(var.image_mass(row, IMAGE_KEYS), wanted["image_mass"])
        assert_near(1 - var.sink_ratio(row, IMAGE_KEYS, flags, "paper"), wanted["non_sink_ratio"])
        assert_near(row[flags].sum(), wanted["sink_mass"])
        assert_near(row[IMAGE_KEYS & ~flags].sum(), wanted["non_sink_mass"])
        assert bool(chosen[head]) == wanted["selected"]
        if wanted["selected"]:
            assert_near(spec.move_fraction * row[flags].sum(), wanted["omega"])
            assert_near(var.gain(row, IMAGE_KEYS, flags, spec), wanted["gain"])


def test_example_of_head_output() -> None:
    example = EXAMPLES["var"]["head_output"]
    values, expected = tensor(example["inputs"]["values"]), example["expected"]
    assert_near(redistribution("paper_p0.6_rho0.5")[0] @ values, expected["baseline"])
    for name in ("paper_p0.6_rho0.5", "release_keep0.6_rho0.5"):
        weights, flags, spec = redistribution(name)
        edited = var.redistributed(weights, IMAGE_KEYS, flags, spec)
        assert_near(edited @ values, expected[name])


def test_example_of_log_bias() -> None:
    expected = EXAMPLES["var"]["log_bias"]["expected"]
    weights, flags, spec = redistribution(EXAMPLES["var"]["log_bias"]["inputs"]["case"])
    factor = var.redistributed(weights, IMAGE_KEYS, flags, spec)[0] / weights[0]
    assert_near(factor.log(), expected["bias"])
    unnormalised = (weights[0].log() + factor.log()).exp()
    assert_near(unnormalised.sum(), expected["partition"])
    assert_near(unnormalised / unnormalised.sum(), expected["attention"])


def test_example_in_float16_is_within_its_rounding() -> None:
    """The release's float16 row is less exact than ours, and its sum is not 1."""
    expected = EXAMPLES["var"]["release_fp16_head0_keep0.4"]
    weights, flags, spec = redistribution("release_keep0.4_rho0.5")
    row = var.redistributed(weights, IMAGE_KEYS, flags, spec)[0]
    assert_near(row, expected["attention"], atol=2.0**-12)
    assert_near(sum(expected["attention"]), expected["sum"], atol=2e-6)


def test_example_of_scaled_tau_and_cosine_bound() -> None:
    for row in EXAMPLES["var"]["tau_scaled"]:
        assert_near(sink_search.scaled_tau(row["hidden"]), row["tau"])
        assert_near(row["hidden"] ** 0.5, row["ceiling"])
    for row in EXAMPLES["var"]["cosine_bound"]:
        anchor, rest = row["phi_anchor"], (row["hidden"] - row["phi_anchor"] ** 2) ** 0.5
        assert_near(0.9 * anchor - (1 - 0.81) ** 0.5 * rest, row["phi_bound_at_cos_0.9"])
        cosine = row["cos_guaranteeing_phi_20"]
        assert_near(cosine * anchor - math.sqrt(1 - cosine**2) * rest, 20.0, atol=1e-8)


def test_example_of_discovery() -> None:
    example = EXAMPLES["var"]["auto_discovery"]
    x, expected = tensor(example["inputs"]["x"]), example["expected"]
    tau = sink_search.scaled_tau(x.shape[-1])
    assert_near(tau, expected["tau_D"])
    assert_near(sink_search.cosine_to(x, 0), expected["cos_to_anchor"])
    profile, background = sink_search.anchor_profile(x, 0)
    for channel, wanted in expected["anchor_profile_channels"].items():
        assert_near(profile[int(channel)], wanted)
    for channel, wanted in expected["background_channels"].items():
        assert_near(background[int(channel)], wanted)
    dims = sink_search.discovered_dims(x, 0, tau)
    assert dims == expected["dims"]
    assert_near(var.phi(x, tuple(dims)), expected["phi"])
    flags = var.phi(x, tuple(dims)) >= tau
    assert [row.nonzero().flatten().tolist() for row in flags] == expected["sinks_at_tau_D"]
    every = var.phi(x, tuple(range(x.shape[-1]))) >= tau
    assert int(every.sum()) == expected["tokens_flagged_by_max_over_all_channels"]


# ---- worked examples: VHR


def vhr_outputs(scale: float) -> tuple[Tensor, Tensor]:
    """Head outputs [4, 2] of the example with and without the image, values times scale."""
    given, expected = (EXAMPLES["vhr"]["shared"][part] for part in ("inputs", "expected"))
    keys, queries = tensor(given["keys"]), tensor(given["queries"])
    values, text = tensor(given["values"]) * scale, given["text_branch_keys"]
    z = queries @ keys.T / 2**0.5
    full, short = z.softmax(-1), z[:, text].softmax(-1)
    assert_near(full, expected["attention_full"])
    assert_near(short, expected["attention_text"])
    return (full[:, None] @ values)[:, 0], (short[:, None] @ values[:, text])[:, 0]


def assert_filter(scores: Tensor, activation: Tensor, rule: dict, guard: float, ddof: int) -> None:
    """One rule of the examples: thresholds, zeroed heads, scores left, median, heads."""
    for values, prefix in ((scores, ""), (activation, "ta_")):
        spread = values.std(correction=ddof)
        assert_near(values.mean(), rule[prefix + "mean"])
        assert_near(spread, rule[prefix + "std"])
        assert_near(values.mean() + spread, rule[prefix + "threshold"])
    zeroed = vhr.outliers(scores, activation, guard, ddof)
    assert bool(scores.std(correction=ddof) > guard) == rule["filter_active"]
    assert zeroed.nonzero().flatten().tolist() == rule["zeroed"]
    left = scores.masked_fill(zeroed, 0.0)
    assert_near(left, rule["scores"])
    assert_near(left.median(), rule["lower_median"])
    assert vhr.above_median(left).nonzero().flatten().tolist() == rule["heads"]


@pytest.mark.parametrize("name", ["case_A", "case_B"])
def test_example_of_head_choice(name: str) -> None:
    case = EXAMPLES["vhr"][name]
    expected = case["expected"]
    full, text = vhr_outputs(case["value_scale"])
    activation = vhr.text_activation(text)
    euclid, squared = (vhr.divergence(full, text, rule) for rule in ("paper", "release"))
    assert_near(full, expected["full"])
    assert_near(text, expected["text"])
    assert_near(euclid, expected["vhd"])
    assert_near(squared, expected["vhd_squared"])
    assert_near(activation, expected["text_activation"])
    rules = expected["rules"]
    assert_filter(squared, activation, rules["release"], guard=1.0, ddof=1)
    assert_filter(euclid, activation, rules["paper_ddof1"], guard=-math.inf, ddof=1)
    assert_filter(euclid, activation, rules["paper_ddof0"], guard=-math.inf, ddof=0)
    unfiltered = vhr.scores_of(full, text, Vhr(layers=(0,), filter=False))
    assert (
        vhr.above_median(unfiltered).nonzero().flatten().tolist()
        == (expected["heads_without_filter"])
    )
    ordered = {
        key: values.sort(descending=True).values
        for key, values in {"t_vhd_cumulative": euclid, "t_vhd_cumulative_squared": squared}.items()
    }
    for key, values in ordered.items():
        assert_near(values.cumsum(0), expected[key])


@pytest.mark.parametrize("semantics", ["release", "paper"])
@pytest.mark.parametrize("name", ["case_A", "case_B"])
def test_example_of_reinforcement(name: str, semantics: str) -> None:
    case = EXAMPLES["vhr"][name]
    expected = case["expected"]["after_alpha2"][semantics]
    full, text = vhr_outputs(case["value_scale"])
    chosen = vhr.above_median(vhr.scores_of(full, text, Vhr((0,), semantics=semantics)))
    assert chosen.nonzero().flatten().tolist() == expected["heads"]
    after = vhr.reinforced(full, chosen, 2.0)
    assert_near(full.flatten(), case["expected"]["concat_before"])
    assert_near(full.sum(0), case["expected"]["sum_before"])
    assert_near(after.flatten(), expected["concat"])
    assert_near(after.sum(0), expected["sum"])
    contribution = full[chosen].sum(0)
    for total, key in ((full.sum(0), "cosine_before"), (after.sum(0), "cosine_after")):
        assert_near(torch.cosine_similarity(total, contribution, dim=0), expected[key])


def test_example_of_distance_and_std_conventions() -> None:
    given, expected = (EXAMPLES["vhr"]["case_C"][part] for part in ("inputs", "expected"))
    euclid, activation = tensor(given["vhd"]), tensor(given["text_activation"])
    for ddof in (0, 1):
        threshold = activation.mean() + activation.std(correction=ddof)
        assert_near(threshold, expected[f"ta_threshold_ddof{ddof}"])
    never = -math.inf
    assert_filter(euclid, activation, expected["euclid_ddof0"], never, 0)
    assert_filter(euclid, activation, expected["euclid_ddof1"], never, 1)
    assert_filter(euclid**2, activation, expected["squared_ddof0"], 1.0, 0)
    assert_filter(euclid**2, activation, expected["squared_ddof1_release"], 1.0, 1)


# ---- worked examples: GIFT


def assert_map(found: Tensor, expected: dict) -> None:
    assert_near(found, expected["saliency"])
    assert_near(found.mean(), expected["mean"])
    assert_near(found.std(), expected["sd"])
    assert_near(found.mean() - 3 * found.std(), expected["clip_low"])
    assert_near(found.mean() + 3 * found.std(), expected["clip_high"])
    assert_near(gift.normalised(found), expected["normalised"])


def test_example_of_saliency() -> None:
    given, expected = (EXAMPLES["gift"]["7.1"][part] for part in ("inputs", "expected"))
    rows = tensor(given["rows"])
    change = gift.positive_change(rows[None])
    assert_near(change[0], expected["positive_change"])
    content = [row - 1 for row in given["content_rows"]]
    assert_map(gift.saliency(change[:, content], count=1), expected["content"])
    assert_map(gift.saliency(change, count=1), expected["all_tokens"])
    assert_map(rows[given["content_rows"]].mean(0), expected["static_map"])
    found = gift.normalised(gift.saliency(change[:, content], count=1))
    assert_near((5 * found).exp(), expected["gain_alpha5"])
    assert_near((2 * found).exp(), expected["gain_alpha2"])


def test_example_of_saliency_from_whole_rows() -> None:
    """The same, as the attention of 4 + 4 positions: predecessor, then three query tokens."""
    given, expected = (EXAMPLES["gift"]["7.1"][part] for part in ("inputs", "expected"))
    weights = torch.zeros(1, 8, 8, dtype=torch.float64)
    weights[0, 4:, :4] = tensor(given["rows"])
    image, query, content = mask([0, 1, 2, 3], 8), mask([5, 6, 7], 8), mask([6, 7], 8)
    wanted = expected["content"]["normalised"] + [0.0] * 4
    assert_near(gift.saliency_map([weights], image, query, content, 1), wanted)
    wanted = expected["all_tokens"]["normalised"] + [0.0] * 4
    for no_content in (mask([], 8), mask([4], 8)):  # decision 5: all of the query
        assert_near(gift.saliency_map([weights], image, query, no_content, 1), wanted)
    assert gift.saliency_map([weights], image, mask([], 8), content, 1) is None


@pytest.mark.parametrize("alpha", [5, 2])
def test_example_of_one_decode_step(alpha: int) -> None:
    example = EXAMPLES["gift"]["7.2"]
    given, expected = example["inputs"], example["expected"][f"alpha{alpha}"]
    rows = tensor(given["row"])[None]
    image, query = mask(given["visual_keys"], 8), mask(given["query_keys"], 8)
    found = torch.cat([tensor(given["normalised"]), torch.zeros(4, dtype=torch.float64)])
    count, every = gift.heads_kept(1, 0.5), torch.ones(1, dtype=torch.bool)
    result = gift.enhanced(rows, image, query, found, Gift(alpha, 0, (1,)), count)
    boosted = gift.visual_boost(rows, image, (alpha * found).exp(), every)
    unnormalised = gift.query_boost(boosted, query, given["beta"] * result.ratio, every)
    assert_near(result.ratio, expected["r"])
    assert_near(unnormalised[0], expected["unnormalised"])
    assert_near(unnormalised.sum(), expected["Z"])
    assert_near(result.rows[0], expected["after"])
    assert_near((unnormalised / rows).log()[0], expected["logit_bias"])
    visual_only = gift.renormalised(boosted)
    assert_near(visual_only[0], expected["visual_only"]["after"])
    for after, wanted in ((result.rows, expected), (visual_only, expected["visual_only"])):
        assert_near(gift.mass(after, image)[0], wanted["mass_visual"])
        assert_near(gift.mass(after, query)[0], wanted["mass_query"])
        assert_near(gift.mass(after, ~image & ~query)[0], wanted["mass_other"])


def test_example_of_four_heads() -> None:
    given, expected = (EXAMPLES["gift"]["7.3"][part] for part in ("inputs", "expected"))
    rows = tensor(given["rows"])
    image, query = mask(given["visual_keys"], 8), mask(given["query_keys"], 8)
    found = torch.cat([tensor(given["normalised"]), torch.zeros(4, dtype=torch.float64)])
    spec = Gift(given["alpha"], 0, (1,), beta=given["beta"])
    assert gift.heads_kept(4, spec.head_fraction) == given["heads_kept"]
    result = gift.enhanced(rows, image, query, found, spec, given["heads_kept"])
    assert_near(gift.mass(rows, image), expected["visual_mass"])
    assert_near(gift.mass(rows, query), expected["query_mass"])
    assert result.visual_heads.nonzero().flatten().tolist() == expected["heads_visual"]
    assert result.query_heads.nonzero().flatten().tolist() == expected["heads_query"]
    assert_near(result.ratio, expected["r"])
    assert_near(result.rows, expected["after"])


def test_example_of_the_clip() -> None:
    example = EXAMPLES["gift"]["7.4"]
    assert_map(tensor(example["inputs"]["saliency"]), example["expected"]["clipped"])


def test_ties_go_to_the_lowest_head_and_a_flat_map_is_zero() -> None:
    assert gift.top_heads(tensor([1, 2, 2, 2]), 2).tolist() == [False, True, True, False]
    assert not gift.normalised(tensor([0.3, 0.3, 0.3])).any()
    assert not gift.normalised(tensor([0.3])).any()
    assert [gift.heads_kept(heads, 0.5) for heads in (1, 3, 4)] == [1, 1, 2]


def test_equal_scores_choose_no_head() -> None:
    assert not vhr.above_median(tensor([0.0, 0.0, 0.0, 0.0])).any()


# ---- PAINT


def test_example_of_the_patches() -> None:
    given, expected = (EXAMPLES["paint"]["A6"][part] for part in ("inputs", "expected"))
    first, last = (
        tensor(given[f"vit_{layer}_cls_rows"]).sum(0) for layer in ("first", "penultimate")
    )
    spec = Paint(given["alpha"], given["beta"], given["rho"], (2,))
    assert paint.largest(first, spec.rho) == set(expected["L0"])
    assert abs(paint.threshold(last) - expected["threshold"]) < 1e-9
    assert paint.sets(first, last, first, spec) == ({*expected["L"]}, {*expected["S"]})
    places = torch.tensor(given["visual_keys"])
    picture = paint.Picture(places, first, last, first)
    c = paint.coefficients([picture], mask(given["visual_keys"], 12), spec)
    found = paint.raised(tensor(given["logits"]), c)
    assert_near(found, expected["paint"]["logits"])
    assert_near(found.softmax(-1), expected["paint"]["attention"])
