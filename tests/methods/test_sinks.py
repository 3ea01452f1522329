"""The search for sink channels: its rule, its checks, and every reason to find none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlm_patch
from tests import tiny
from tests.compare import error, generate, planted
from tests.examples import EXAMPLES, PRECISIONS, assert_near, places, tensor
from tests.reference import trace
from vlm_patch import VAR
from vlm_patch.methods import sinks
from vlm_patch.methods.sinks import Found, judge, primary_window, scaled_tau, sink_channels
from vlm_patch.methods.var import sink_score

EXAMPLE = EXAMPLES["var"]["auto_discovery"]

# ---- the rule


def relative(x: Tensor) -> Tensor:
    return x.abs() / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_discovery(dtype: torch.dtype) -> None:
    x, expected = tensor(EXAMPLE["inputs"]["x"], dtype), EXAMPLE["expected"]
    tau = scaled_tau(x.shape[-1])
    assert tau == pytest.approx(expected["tau_D"], abs=1e-12)
    cosine = torch.cosine_similarity(x, x[:, :1], dim=-1)
    assert_near(cosine, expected["cos_to_anchor"])
    ordinary = cosine.abs() < EXAMPLE["inputs"]["cos_threshold"]
    anchors = torch.zeros(len(x), dtype=torch.long)
    dims = sink_channels(relative(x), anchors, ordinary)
    assert list(dims) == expected["dims"]
    score = sink_score(x, dims)
    assert_near(score, expected["phi"])
    assert [places(row) for row in score >= tau] == expected["sinks_at_tau_D"]


def test_without_contrast_a_register_channel_would_pass() -> None:
    """Channel 7 is large in every token: only the comparison with ordinary tokens keeps it out."""
    x = tensor(EXAMPLE["inputs"]["x"])
    nothing_ordinary = torch.zeros(x.shape[:2], dtype=torch.bool)
    nothing_ordinary[:, 1] = True
    quiet = relative(x)
    quiet[:, 1] = 0.1
    found = sink_channels(quiet, torch.zeros(3, dtype=torch.long), nothing_ordinary)
    assert list(found) == EXAMPLE["expected"]["channels_passing_tau_only"]


def channels(at_anchor: dict[int, float], elsewhere: dict[int, float] | None = None) -> list[int]:
    """Of 64 channels, those found where anchor and ordinary tokens have these relative sizes."""
    found = torch.full((3, 4, 64), 0.5)
    for channel, size in at_anchor.items():
        found[:, 0, channel] = size
    for channel, size in (elsewhere or {}).items():
        found[:, 1:, channel] = size
    ordinary = torch.ones(3, 4, dtype=torch.bool)
    ordinary[:, 0] = False
    return list(sink_channels(found, torch.zeros(3, dtype=torch.long), ordinary))


def test_each_condition_of_the_rule() -> None:
    assert channels({3: 2.4}) == []  # tau_D is 2.5
    assert channels({3: 4.0}) == [3]
    assert channels({3: 4.0, 9: 1.9}) == [3]
    assert channels({3: 6.0, 9: 2.9}) == [3]  # less than half of the strongest
    assert channels({3: 6.0, 9: 3.1}) == [3, 9]
    assert channels({3: 6.0}, {3: 2.1}) == []  # not three times the ordinary
    assert channels({3: 6.0}, {3: 1.9}) == [3]
    assert channels({3: 2.9}) == []  # an ordinary size below 1 counts as 1


def test_at_most_four_channels_the_strongest() -> None:
    assert channels({1: 5.0, 20: 6.0, 3: 7.0, 40: 8.0, 50: 6.5}) == [3, 20, 40, 50]


@pytest.mark.parametrize(
    ("norms", "window"),
    [
        ([1, 9, 9, 9, 2], (1, 4)),
        ([1, 2, 9, 9.5, 9, 1, 1], (2, 5)),
        ([5, 1, 9, 8, 7.9, 7.8], (2, 3)),  # the fall before the rise does not count
        ([1, 9, 10, 11], (1, 4)),  # no fall: to the end
        ([1, 2, 3, 9], (3, 4)),
    ],
    ids=str,
)
def test_primary_window(norms: list[float], window: tuple[int, int]) -> None:
    assert primary_window(tensor(norms)) == window


# ---- the checks, on tensors that are made to pass them


def recorded(samples: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """6 layers, 120 tokens of width 64: an anchor, 100 image tokens with one sink, text.

    Every sample but the first begins with 2 tokens of padding.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = 2 * torch.rand(samples, 6, 120, 64, generator=generator) - 1
    valid, image = torch.ones(2, samples, 120, dtype=torch.bool)
    image[:, :10], image[:, 110:] = False, False
    attention = torch.full((samples, 6, 120), 0.001)
    value_path = torch.full((samples, 6, 120), 0.01)
    for sample in range(samples):
        first = 2 if sample else 0
        valid[sample, :first] = False
        for token in (first, 60):
            blocks[sample, 1:5, token, 3], blocks[sample, 1:5, token, 10] = 30.0, -25.0
        attention[sample, :, 60], value_path[sample, :, 60] = 0.05, 0.001
    return {
        "blocks": blocks,
        "attention": attention,
        "value_path": value_path,
        "valid": valid,
        "image": image,
    }


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_sinks_that_pass_every_check(samples: int) -> None:
    assert judge(**recorded(samples)) == Found((3, 10))


def refused(**changes: Tensor) -> str:
    found = judge(**(recorded() | changes))
    assert found.dims == ()
    return found.reason


def test_no_channel_sticks_out() -> None:
    blocks = recorded()["blocks"]
    blocks[..., 3].clamp_(-1, 1)
    blocks[..., 10].clamp_(-1, 1)
    reason = refused(blocks=blocks)
    assert "The first token's strongest channel reaches " in reason
    assert "times its RMS; 2.5 and a contrast of 3 to ordinary tokens are needed." in reason


def test_all_tokens_look_alike() -> None:
    blocks = recorded()["blocks"]
    blocks[:] = blocks[:, :, 2:3]
    assert refused(blocks=blocks) == "Every token looks like the first one."


def test_the_halves_disagree() -> None:
    """One sample has another channel beside the common one."""
    record = recorded()
    for token in (2, 60):
        record["blocks"][1, 1:5, token, 10] = 0.0
        record["blocks"][1, 1:5, token, 20] = 25.0
    reason = refused(blocks=record["blocks"])
    assert reason.startswith("Channels [")
    assert reason.endswith("] did not come out of both halves of the data.")


@pytest.mark.parametrize(("flagged", "share"), [(0, "0.0%"), (4, "4.0%")])
def test_too_few_or_too_many_image_tokens(flagged: int, share: str) -> None:
    record = recorded()
    record["blocks"][:, 1:5, 60, 3], record["blocks"][:, 1:5, 60, 10] = 0.0, 0.0
    record["blocks"][:, 1:5, 50 : 50 + flagged, 3] = 30.0
    reason = refused(blocks=record["blocks"])
    expected = f"Channels [3, 10] flag {share} of the image tokens, expected 0.2 to 3 %."
    assert reason == expected


def test_flagged_tokens_that_draw_little_attention() -> None:
    attention = recorded()["attention"]
    attention[:, :, 60] = 0.004
    assert refused(attention=attention) == (
        "Channels [3, 10] flag image tokens that draw 4.0 times the attention of others, "
        "expected 5."
    )


def test_flagged_tokens_that_carry_much() -> None:
    value_path = recorded()["value_path"]
    value_path[:, :, 60] = 0.02
    expected = "Channels [3, 10] flag image tokens that carry more than others do."
    assert refused(value_path=value_path) == expected


def test_attention_outside_the_window_does_not_count() -> None:
    record = recorded()
    record["attention"][:, [0, 5], 60] = 0.0
    record["value_path"][:, [0, 5], 60] = 9.0
    assert judge(**record) == Found((3, 10))


# ---- on a model


def value_path(model: nn.Module, block: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    """Mean over heads of the mean weight of a key times |v W_O| `[S]`, step by step."""
    attention, heads = block.self_attn, weights.shape[0]
    values = attention.v_proj(block.input_layernorm(x)).view(len(x), -1, x.shape[-1] // heads)
    total = torch.zeros(len(x), dtype=x.dtype)
    for head in range(heads):
        own = values[:, head * values.shape[1] // heads]
        columns = attention.o_proj.weight[:, head * own.shape[1] : (head + 1) * own.shape[1]]
        total += weights[head].mean(0) * (own @ columns.T).norm(dim=-1)
    return total / heads


@pytest.mark.parametrize("kind", ["llava", "llava-gqa"])
def test_what_is_recorded_of_the_first_prompt(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block inputs, attention of text behind the image, value paths: as in the stock model."""
    model = tiny.float64(planted(kind))
    batch = tiny.inputs(model)
    batch["pixel_values"] = batch["pixel_values"].double()
    calls: list[tuple[Tensor, ...]] = []

    def catch(*args: Tensor) -> Found:
        calls.append(args)
        return Found(tiny.SINK_DIMS)

    monkeypatch.setattr(sinks, "judge", catch)
    with vlm_patch.wrap(model, VAR(tau=3.0)) as patch:
        outputs = [generate(model, batch), generate(model, batch)]
        assert "dims=(3, 10)" in patch.describe()
    assert len(calls) == 1
    blocks, attention, values, valid, image = calls[0]
    (sample,) = tiny.samples(model, batch)
    run = trace(model, sample).run
    assert valid.all()
    assert torch.equal(image[0], sample.image)
    after = sample.turns[0].query
    for layer, block in enumerate(model.model.language_model.layers):
        weights = run.stock_weights[layer][:, after]
        near: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
        expected = value_path(model, block, run.block_inputs[layer], weights)
        assert_near(blocks[0, layer], run.block_inputs[layer].tolist())
        torch.testing.assert_close(attention[0, layer].double(), weights.mean((0, 1)), **near)
        torch.testing.assert_close(values[0, layer].double(), expected, **near)
    for output in outputs:  # found channels act from the first prompt on
        assert error(model, batch, output, ["var"]) <= 1e-10


def test_a_prompt_that_ends_with_its_image_cannot_be_judged() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, [[tiny.BOS, 5, 6, tiny.IMAGE]])
    with (
        vlm_patch.wrap(model, "var"),
        pytest.warns(UserWarning, match="The first prompt has no text after its image"),
        torch.no_grad(),
    ):
        model(**batch)


def test_too_many_sinks_of_a_planted_model_are_refused_in_words() -> None:
    """3 of 16 image tokens are planted: more than the check allows."""
    model = planted("llava")
    with (
        vlm_patch.wrap(model, "var"),
        pytest.warns(UserWarning, match=r"flag [\d.]+% of the image tokens, expected 0.2 to 3 %"),
        torch.no_grad(),
    ):
        model(**tiny.inputs(model))
