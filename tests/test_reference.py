"""The reference against the unpatched model, the specifications' worked examples and invariants.

Everything else is compared with the reference, so it is compared with nothing of the library.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.reference import Gift, Sample, Var, Vhr, capture, gift, logits, sinks, trace, var, vhr

EXAMPLES = json.loads((Path(__file__).parent / "data" / "worked_examples.json").read_text())
MODELS = {
    "llava": tiny.llava,
    "llava-gqa": lambda: tiny.llava(kv_heads=2),
    "qwen2-vl": tiny.qwen2_vl,
}
TAU = 3.0
VAR = Var(tiny.SINK_DIMS, TAU)
VAR_RELEASE = Var(tiny.SINK_DIMS, TAU, rho_nonsink=0.3, semantics="release")
GIFT = Gift(alpha=3.0, saliency_layer=1, layers=(2, 3))
GIFT_INSIDE = Gift(alpha=3.0, saliency_layer=2, layers=(1, 2, 3), beta=1.2)
VHR = Vhr(layers=(1, 2, 3))
VHR_PAPER = Vhr(layers=(0, 2), semantics="paper")
METHODS = [VAR, VAR_RELEASE, GIFT, GIFT_INSIDE, VHR, VHR_PAPER]
ANSWER = torch.tensor([60, 61, tiny.SINK_WORD, 62, 63, tiny.IMAGE, 64, 65])


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


def planted(kind: str) -> nn.Module:
    return tiny.plant(MODELS[kind]())


def sample_of(model: nn.Module, row: int = 0, answer: Tensor | None = ANSWER) -> Sample:
    batch = tiny.inputs(model, tiny.MIXED_BATCH)
    return capture(model, tiny.single(model, batch, row), answer)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return planted(request.param)


# ---- against the unpatched model


@pytest.mark.parametrize("row", range(len(tiny.MIXED_BATCH)))
@pytest.mark.parametrize("kind", MODELS)
def test_without_methods_it_is_the_model(kind: str, row: int) -> None:
    exact = tiny.float64(planted(kind))
    one = tiny.single(exact, tiny.inputs(exact, tiny.MIXED_BATCH), row)
    one["pixel_values"] = one["pixel_values"].double()
    answer = ANSWER[ANSWER != tiny.IMAGE]
    sample = capture(exact, one, answer)
    one["input_ids"] = torch.cat([one["input_ids"], answer[None]], dim=1)
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    if "mm_token_type_ids" in one:
        one["mm_token_type_ids"] = (one["input_ids"] == tiny.IMAGE).int()
    with torch.no_grad():
        stock = exact(**one).logits[0]
    torch.testing.assert_close(logits(exact, sample), stock, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", MODELS)
def test_a_padded_row_is_its_single_sample(kind: str) -> None:
    model = planted(kind)
    batch = tiny.inputs(model, tiny.MIXED_BATCH)
    with torch.no_grad():
        padded = model(**batch).logits
    for row in range(len(tiny.MIXED_BATCH)):
        expected = logits(model, sample_of(model, row, answer=None))
        torch.testing.assert_close(
            padded[row, -len(expected) :].double(), expected, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_those_of_eager_attention(kind: str) -> None:
    eager = tiny.plant({"qwen2-vl": tiny.qwen2_vl}.get(kind, tiny.llava)(attn="eager"))
    one = tiny.single(eager, tiny.inputs(eager), 0)
    with torch.no_grad():
        stock = eager(**one, output_attentions=True).attentions
    run = trace(eager, capture(eager, one)).run
    for ours, theirs in zip(run.weights, stock, strict=True):
        torch.testing.assert_close(ours, theirs[0].double(), rtol=0, atol=2e-6)


def test_text_outputs_are_those_of_a_prompt_without_the_image(model: nn.Module) -> None:
    exact, caught = tiny.float64(model), []
    for block in exact.model.language_model.layers:
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: caught.append(args[0][0, -1])
        )
    ids = tiny.single(model, tiny.inputs(model, tiny.MIXED_BATCH), 2)["input_ids"]
    ids = ids[ids != tiny.IMAGE][None]
    with torch.no_grad():
        exact(input_ids=ids)
    found = trace(model, sample_of(model, row=2), [VHR])
    for layer in VHR.layers:
        text = caught[layer].view(4, -1)
        full = found.run.outputs[layer][:, sample_of(model, 2, None).length - 1]
        full = torch.where(found.chosen[layer][:, None], full / VHR.alpha, full)
        torch.testing.assert_close(
            found.scores[layer], vhr.scores_of(full, text, VHR), rtol=0, atol=1e-9
        )


# ---- the methods on a model


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_acts_and_a_row_never_depends_on_later_ones(
    model: nn.Module, method: object
) -> None:
    """The second half is what lets one full pass stand for a prefill and decode steps."""
    for row in range(len(tiny.MIXED_BATCH)):
        whole = sample_of(model, row)
        edited = logits(model, whole, [method])
        assert (edited - logits(model, whole)).abs().max() > 1e-2
        for length in (whole.length - len(ANSWER), whole.length - 3):
            shorter = logits(model, whole.until(length), [method])
            torch.testing.assert_close(shorter, edited[:length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_heads_off_leave_the_stock_model(model: nn.Module, method: object) -> None:
    sample = sample_of(model)
    off = {method.name: torch.zeros(4, 4, dtype=torch.bool)}
    assert torch.equal(logits(model, sample, [method], off), logits(model, sample))
    on = {method.name: torch.ones(4, 4, dtype=torch.bool)}
    assert torch.equal(logits(model, sample, [method], on), logits(model, sample, [method]))


@pytest.mark.parametrize("method", [GIFT, VHR], ids=str)
def test_a_head_that_is_off_still_counts(model: nn.Module, method: object) -> None:
    sample, layer = sample_of(model), 2
    table = torch.ones(4, 4, dtype=torch.bool)
    table[layer, :3] = False
    full = trace(model, sample, [method])
    part = trace(model, sample, [method], {method.name: table})
    if method is VHR:
        assert torch.equal(full.chosen[layer], part.chosen[layer])
    else:
        row = sample.turns[0].end
        assert part.enhanced[layer, row - 1].ratio == full.enhanced[layer, row - 1].ratio
    # nothing before this layer differs, so in it the one head left on is as it was
    assert torch.equal(part.run.outputs[layer][3], full.run.outputs[layer][3])
    assert torch.equal(
        part.run.weights[layer][:3, : sample.length], part.run.stock_weights[layer][:3]
    )


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_without_an_image_it_is_the_stock_model(model: nn.Module, method: object) -> None:
    ids = torch.tensor([[tiny.BOS, 20, 21, 22]])
    sample = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert not sample.image.any()
    assert torch.equal(logits(model, sample, [method]), logits(model, sample))


@pytest.mark.parametrize("method", [VAR, VAR_RELEASE], ids=str)
def test_var_moves_weight_only_within_text_rows_after_the_image(
    model: nn.Module, method: Var
) -> None:
    for row in (0, 3):
        sample = sample_of(model, row)
        found = trace(model, sample, [method])
        first_image = int(sample.image.int().argmax())
        acting = {"paper": {0, 1, 2}, "release": {2}}[method.semantics]
        assert {layer for layer in range(4) if found.selected.get(layer) is not None} == acting
        assert sum(int(selected.sum()) for selected in found.selected.values()) > 5
        for layer in range(4):
            before, after = found.run.stock_weights[layer], found.run.weights[layer]
            torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))
            changed = (before != after).any(-1)
            assert not changed[:, : first_image + 1].any()
            assert not changed[:, sample.image].any()
            if layer in acting:
                others = ~sample.image & ~found.sinks[layer]
                assert torch.equal(before[..., others], after[..., others])


def test_var_leaves_image_states_and_their_sinks_alone(model: nn.Module) -> None:
    sample = sample_of(model)
    found, stock = trace(model, sample, [VAR]), sinks(model, sample, VAR.dims, VAR.tau)
    for layer, flags in found.sinks.items():
        assert torch.equal(flags & sample.image, stock[layer] & sample.image)
    counts = (stock & sample.image).sum(-1)
    assert counts.min() >= 2
    assert counts[1:].max() < sample.image.sum() / 2 + 1


def test_var_tests_generated_tokens_in_paper_semantics_only(model: nn.Module) -> None:
    sample = sample_of(model)
    place = sample.turns[0].end + ANSWER.tolist().index(tiny.SINK_WORD)
    assert trace(model, sample, [VAR]).sinks[2][place]
    assert not trace(model, sample, [VAR_RELEASE]).sinks[2][place]


def test_gift_edits_the_last_prompt_row_and_generated_rows(model: nn.Module) -> None:
    sample = sample_of(model)
    found = trace(model, sample, [GIFT])
    last = sample.turns[0].end - 1
    for layer in range(4):
        before, after = found.run.stock_weights[layer], found.run.weights[layer]
        assert torch.equal(before[:, :last], after[:, :last])
        assert (before[:, last:] != after[:, last:]).any() == (layer in GIFT.layers)
        torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))
    assert found.maps[0].min() == 0
    assert found.maps[0].max() == 1
    assert not found.maps[0][~sample.image[: last + 1]].any()


@pytest.mark.parametrize("spec", [GIFT, GIFT_INSIDE], ids=str)
def test_gift_with_alpha_0_and_beta_1_is_the_identity(model: nn.Module, spec: Gift) -> None:
    nothing = Gift(0.0, spec.saliency_layer, spec.layers)
    sample = sample_of(model)
    torch.testing.assert_close(
        logits(model, sample, [nothing]), logits(model, sample), rtol=0, atol=1e-12
    )


def test_gift_reads_the_map_of_a_pass_without_gift(model: nn.Module) -> None:
    """Also where the saliency layer is enhanced and the query holds the last prompt token."""
    sample = sample_of(model)
    turn, image = sample.turns[0], sample.image[: sample.turns[0].end]
    stock = trace(model, sample.until(turn.end)).run.weights[GIFT_INSIDE.saliency_layer]
    expected = gift.saliency_map(stock, image, turn.query, turn.content, count=2)
    assert torch.equal(trace(model, sample, [GIFT_INSIDE]).maps[0], expected)


def test_vhr_scales_every_row_of_the_chosen_heads(model: nn.Module) -> None:
    sample = sample_of(model)
    found, stock = trace(model, sample, [VHR]), trace(model, sample)
    chosen = found.chosen[1]
    assert 0 < chosen.sum() <= 2
    assert torch.equal(found.run.outputs[1][chosen], 2 * stock.run.outputs[1][chosen])
    assert torch.equal(found.run.outputs[1][~chosen], stock.run.outputs[1][~chosen])
    assert torch.equal(found.run.outputs[0], stock.run.outputs[0])


def test_vhr_with_alpha_1_or_no_layer_is_the_identity(model: nn.Module) -> None:
    sample = sample_of(model)
    for spec in (Vhr(layers=(1, 2, 3), alpha=1.0), Vhr(layers=())):
        assert torch.equal(logits(model, sample, [spec]), logits(model, sample))


# ---- methods together


def test_gift_sees_what_the_methods_before_it_leave(model: nn.Module) -> None:
    sample = sample_of(model)
    after_var, before_var = trace(model, sample, [VAR, GIFT]), trace(model, sample, [GIFT, VAR])
    layer = GIFT.saliency_layer
    assert torch.equal(after_var.gaze[layer], after_var.run.weights[layer])
    assert torch.equal(before_var.gaze[layer], before_var.run.stock_weights[layer])
    assert not torch.equal(after_var.maps[0], before_var.maps[0])


def test_gift_maps_with_the_other_methods_on(model: nn.Module) -> None:
    """VHR chooses its heads in the map's pass for itself, without GIFT."""
    sample = sample_of(model)
    turn, image = sample.turns[0], sample.image[: sample.turns[0].end]
    alone = trace(model, sample.until(turn.end), [VHR])
    weights = alone.run.weights[GIFT_INSIDE.saliency_layer]
    together = trace(model, sample, [GIFT_INSIDE, VHR])
    expected = gift.saliency_map(weights, image, turn.query, turn.content, count=2)
    assert torch.equal(together.maps[0], expected)


def test_order_of_vhr_does_not_matter(model: nn.Module) -> None:
    """It scales outputs, and all weights are edited before any output."""
    sample = sample_of(model)
    orders = [[VHR, VAR, GIFT], [VAR, VHR, GIFT], [VAR, GIFT, VHR]]
    first, *others = (logits(model, sample, order) for order in orders)
    assert all(torch.equal(first, other) for other in others)


def test_a_second_turn_keeps_the_first_and_reads_a_new_map(model: nn.Module) -> None:
    first = sample_of(model)
    methods = [VAR_RELEASE, GIFT, VHR]
    second = first.asked(model, torch.tensor([66, 70, 71, tiny.SINK_WORD, 72]))
    second = second.followed_by(model, torch.tensor([73, 74]))
    one, two = trace(model, first, methods), trace(model, second, methods)
    torch.testing.assert_close(two.run.logits[: first.length], one.run.logits, rtol=0, atol=1e-12)
    assert torch.equal(two.maps[0], one.maps[0])
    assert (two.maps[1][: len(one.maps[0])] - one.maps[0]).abs().max() > 0.1
    assert all(torch.equal(two.chosen[layer], one.chosen[layer]) for layer in VHR.layers)
    assert not two.sinks[2][first.turns[0].end :].any()
    rows = {row for _, row in two.enhanced}
    end = second.turns[1].end
    assert rows == set(range(first.turns[0].end - 1, first.length)) | {end - 1, end, end + 1}


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
        assert_near(var.scaled_tau(row["hidden"]), row["tau"])
        assert_near(row["hidden"] ** 0.5, row["ceiling"])
    for row in EXAMPLES["var"]["cosine_bound"]:
        anchor, rest = row["phi_anchor"], (row["hidden"] - row["phi_anchor"] ** 2) ** 0.5
        assert_near(0.9 * anchor - (1 - 0.81) ** 0.5 * rest, row["phi_bound_at_cos_0.9"])
        cosine = row["cos_guaranteeing_phi_20"]
        assert_near(cosine * anchor - math.sqrt(1 - cosine**2) * rest, 20.0, atol=1e-8)


def test_example_of_discovery() -> None:
    example = EXAMPLES["var"]["auto_discovery"]
    x, expected = tensor(example["inputs"]["x"]), example["expected"]
    tau = var.scaled_tau(x.shape[-1])
    assert_near(tau, expected["tau_D"])
    assert_near(var.cosine_to(x, 0), expected["cos_to_anchor"])
    profile, background = var.anchor_profile(x, 0)
    for channel, wanted in expected["anchor_profile_channels"].items():
        assert_near(profile[int(channel)], wanted)
    for channel, wanted in expected["background_channels"].items():
        assert_near(background[int(channel)], wanted)
    dims = var.discovered_dims(x, 0, tau)
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
    assert_near(gift.saliency_map(weights, image, query, content, 1), wanted)
    wanted = expected["all_tokens"]["normalised"] + [0.0] * 4
    for no_content in (mask([], 8), mask([4], 8)):  # decision 5: all of the query
        assert_near(gift.saliency_map(weights, image, query, no_content, 1), wanted)
    assert gift.saliency_map(weights, image, mask([], 8), content, 1) is None


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


@pytest.mark.parametrize("kind", MODELS)
def test_the_fixtures_decide_clear_of_rounding(kind: str) -> None:
    """So that a float32 implementation must decide alike; see Trace.margins."""
    model = planted(kind)
    for row in range(len(tiny.MIXED_BATCH)):
        margins = trace(model, sample_of(model, row), [VAR, GIFT_INSIDE, VHR]).margins
        assert min(margins.values()) > 2e-5, margins
