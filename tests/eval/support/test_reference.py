"""The reference against the unpatched model, and the invariants of the specifications.

The library is compared with the reference, so the reference is compared with nothing of it. The
worked examples are in reference/test_examples.py.
"""

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from eval.support import tiny
from eval.support.reference import Gift, Sample, Var, Vhr, capture, gift, logits, sinks, trace, vhr

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


def test_cached_generation_of_a_padded_batch_has_the_same_logits(model: nn.Module) -> None:
    batch = tiny.inputs(model, tiny.MIXED_BATCH)
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, **wanted)
    generated = stock.sequences[:, batch["input_ids"].shape[1] :]
    for row, sample in enumerate(tiny.samples(model, batch, generated)):
        expected = logits(model, sample)[sample.turns[0].end - 1 : -1]
        steps = torch.stack([step[row] for step in stock.logits]).double()
        torch.testing.assert_close(steps, expected, rtol=0, atol=1e-5)


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
    assert counts[-1] <= sample.image.sum() / 2
    assert not torch.equal(stock[0], stock[2])  # the set is each layer's own


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
    expected = gift.saliency_map([stock], image, turn.query, turn.content, count=2)
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
    expected = gift.saliency_map([weights], image, turn.query, turn.content, count=2)
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


# ---- the fixtures


COMBINATIONS = [[method] for method in METHODS] + [
    [VAR, GIFT, VHR],
    [VAR, GIFT_INSIDE, VHR],
    [GIFT, VAR, VHR],
]


@pytest.mark.parametrize("methods", COMBINATIONS, ids=str)
def test_decisions_are_clear_of_rounding(model: nn.Module, methods: list) -> None:
    """So that a float32 implementation must decide alike; see Trace.margins."""
    for row in range(len(tiny.MIXED_BATCH)):
        margins = trace(model, sample_of(model, row), methods).margins
        assert min(margins.values()) > 2e-5, margins


def test_the_filter_and_the_clip_act_somewhere(model: nn.Module) -> None:
    zeroed = clipped = 0
    for row in range(len(tiny.MIXED_BATCH)):
        sample = sample_of(model, row, answer=None)
        zeroed += sum(int((s == 0).sum()) for s in trace(model, sample, [VHR]).scores.values())
        weights, turn = trace(model, sample).run.weights[GIFT.saliency_layer], sample.turns[0]
        found = gift.saliency(gift.shifts(weights, sample.image, turn.query, turn.content), 2)
        clipped += int((found > found.mean() + 3 * found.std()).any())
    assert zeroed > 0
    assert clipped > 0


def test_a_processed_prompt_is_captured_with_its_roles() -> None:
    model, processor = tiny.llava(), tiny.processor()
    user = [{"type": "image"}, {"type": "text", "text": "describe the dogs."}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": user}], add_generation_prompt=True
    )
    picture = Image.new("RGB", (48, 32), (200, 30, 30))
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert words[:3] == ["<s>", "USER", ":"]
    assert words[3:19] == ["<image>"] * 16
    assert words[19:] == ["\n", "describe", "the", "dog", "##s", ".", "ASSISTANT", ":"]
    (sample,) = tiny.samples(model, inputs)
    assert sample.image.nonzero().flatten().tolist() == list(range(3, 19))
    assert sample.turns[0].query.nonzero().flatten().tolist() == list(range(19, 27))


def test_masks_given_for_a_padded_batch_lose_their_padding() -> None:
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    query = batch["input_ids"] >= 30
    content = batch["input_ids"] == 30
    for row, sample in enumerate(tiny.samples(model, batch, query=query, content=content)):
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(sample.turns[0].query, query[row][kept])
        assert torch.equal(sample.turns[0].content, content[row][kept])
        assert sample.length == kept.sum()
