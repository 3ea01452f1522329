"""PAI, VAF, Devils, AD-HH, MassTarget: worked examples, defaults, bounds, rows and layers."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eval.support import tiny
from eval.support.agreement import planted
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.examples import EXAMPLES, PRECISIONS, assert_near, mask, tensor
from vlm_patch import ADHH, PAI, VAF, Devils, MassTarget, wrap
from vlm_patch.method import ForwardContext, ModelInfo, Position
from vlm_patch.methods import vaf
from vlm_patch.methods.adhh import text_shares
from vlm_patch.methods.mass_target import target_shares
from vlm_patch.methods.vaf import negative_share
from vlm_patch.primitives.reweighting import reweight

EXAMPLE = EXAMPLES["paint"]["A6"]
GIVEN, EXPECTED = EXAMPLE["inputs"], EXAMPLE["expected"]
pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:no published settings")


def context(image: Tensor, **at: Any) -> ForwardContext:
    """A forward over keys `[B, K]`, all of them rows."""
    nothing = torch.zeros_like(image)
    last = nothing.clone()
    last[:, -1] = True
    return ForwardContext(
        position=Position(prompt_rows=image.shape[1], prompt_end=image.shape[1], **at),
        image=image,
        query=nothing,
        content=nothing,
        valid=~nothing,
        text=~image & (image.cumsum(1) > 0),
        last=last,
        seen=image.any(1),
        reading=True,
        inputs={},
    )


EXAMPLE_CONTEXT = context(mask(GIVEN["visual_keys"], 12)[None])


def edited(method: Any, scores: Tensor) -> Tensor:
    """Scores `[B, H, R, K]` of the example behind a method."""
    state = method.state()
    method.before_forward(EXAMPLE_CONTEXT, state)
    found: Tensor = method.edit_scores(0, scores, EXAMPLE_CONTEXT, state)
    return found


# ---- worked examples


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    ("method", "name"), [(PAI(0.5), "pai_alpha0.5"), (VAF(1.15, 0.95), "vaf_1.15_0.95")]
)
def test_example_of_a_row(method: Any, name: str, dtype: torch.dtype) -> None:
    scores = edited(method, tensor(GIVEN["logits"], dtype)[None, None, None])
    assert_near(scores[0, 0, 0], EXPECTED[name]["logits"])
    assert_near(scores.softmax(-1)[0, 0, 0], EXPECTED[name]["attention"])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_example_of_a_mass_target(dtype: torch.dtype) -> None:
    weights = tensor(GIVEN["logits"], dtype).softmax(-1)[None, None, None]
    image = EXAMPLE_CONTEXT.image
    groups = torch.stack((image, ~image, torch.ones_like(image)), 1)
    found = reweight(weights, groups, lambda masses, _: target_shares(masses, 0.4))
    expected = EXPECTED["mass_target_0.40"]
    assert_near(found[0, 0, 0], expected["attention"])
    bias = found.log() - weights.log()
    assert_near((bias[..., 2] - bias[..., 0])[0, 0, 0], expected["bias"])


def test_devils_by_hand() -> None:
    """Two heads; BOS, image, image, text: an image score rises by half of the mean size."""
    scores = tensor([[[1.0, -2.0, 3.0, 0.5]], [[0.0, 4.0, -1.0, 2.0]]])[None]
    forward = context(mask([1, 2], 4)[None])
    method, state = Devils(0.5), Devils.state()
    method.before_forward(forward, state)
    found = method.edit_scores(0, scores, forward, state)
    assert_near(found, [[[[1.0, -0.5, 4.0, 0.5]], [[0.0, 5.5, 0.0, 2.0]]]])


def test_ad_hh_by_hand() -> None:
    """A head with 0.4 on text loses it, one with less keeps it."""
    weights = tensor([[[0.5, 0.1, 0.3, 0.1]], [[0.5, 0.2, 0.2, 0.1]]])[None]
    forward = context(mask([1], 4)[None])
    method = ADHH("0:*", 0.4)
    state = method.state()
    method.before_forward(forward, state)
    found = method.edit_weights(0, weights, forward, state)
    assert_near(found, [[[[0.5, 0.1, 0.0, 0.0]], [[0.5, 0.2, 0.2, 0.1]]]])


def test_each_sample_and_head_has_a_gate_of_its_own() -> None:
    masses = tensor([[[0.5], [0.3]], [[0.1], [0.45]]])  # [B, H, R]
    both = torch.stack((masses, torch.ones_like(masses)), 1)
    dropped = text_shares(both, 0.4)[:, 0, :, 0]
    assert dropped.tolist() == [[-1, 0], [0, -1]]


# ---- bounds


def test_a_target_where_there_is_nothing_to_move() -> None:
    """A row that sees no image, or nothing else, stays as it is; so does one that has enough."""
    weights = tensor([[[0.0, 0.6, 0.4]], [[1.0, 0.0, 0.0]], [[0.5, 0.3, 0.2]]])[None]
    image = mask([0], 3)[None]
    groups = torch.stack((image, ~image, torch.ones_like(image)), 1)
    found = reweight(weights, groups, lambda m, _: target_shares(m, 0.4))
    assert_near(found, [[*weights[0, :2].tolist(), [[0.4, 0.36, 0.24]]]])
    kept = reweight(weights, groups, lambda m, _: target_shares(m, 0.4, raise_only=True))
    assert_near(kept, weights.tolist())


def test_a_target_is_met_in_float32_however_little_there_was() -> None:
    scores = torch.tensor([[[[-60.0, 0.0, 1.0]], [[40.0, 0.0, 1.0]]]])
    image = mask([0], 3)[None]
    groups = torch.stack((image, ~image, torch.ones_like(image)), 1)
    found = reweight(scores.softmax(-1), groups, lambda m, _: target_shares(m, 0.3))
    assert_near(found[..., 0], [[[0.3], [0.3]]])
    assert_near(found.sum(-1), [[[1.0], [1.0]]])


def test_the_share_of_negative_scores() -> None:
    scores = tensor([[[1.0, -1.0, -2.0, 3.0]], [[-1.0, 1.0, -1.0, -1.0]]])
    found = negative_share(scores, torch.stack((mask([1, 2, 3], 4), mask([1], 4))))
    assert_near(found, [2 / 3, 0.0])


@pytest.mark.parametrize(("share", "said"), [(0.7, 1), (0.5, 0)])
def test_vaf_says_where_its_sign_is_wrong(
    share: float, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for a prompt, when its answer begins."""
    monkeypatch.setattr(vaf, "negative_share", lambda scores, image: image.sum(1) * 0 + share)
    model = planted("llava")
    with wrap(model, VAF(layers=(1, 2))), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(model, tiny.inputs(model, tiny.BATCH_OF_3), 3)
    text = (
        "VAF multiplies attention scores, and 70% of those of image tokens are negative in layer 1"
    )
    assert [str(one.message).startswith(text) for one in caught if "VAF" in str(one.message)] == (
        [True] * said
    )


# ---- defaults


def info(depth: int, profile: Any = None, softmax: Any = None) -> ModelInfo:
    return ModelInfo(depth, 64, 4, profile or {}, softmax)


@pytest.mark.parametrize(
    ("method", "depth", "layers"),
    [
        (PAI(), 32, range(2, 32)),
        (PAI(), 1, [0]),
        (MassTarget(), 6, range(2, 6)),
        (VAF(), 32, range(9, 15)),
        (VAF(), 28, range(8, 13)),
        (VAF(), 2, [1]),
        (Devils(), 32, range(5, 19)),
        (Devils(), 6, range(1, 4)),
    ],
)
def test_layers(method: Any, depth: int, layers: Any) -> None:
    fitted, notes = method.resolve(info(depth))
    assert list(fitted.default_layers(depth)) == list(layers)
    scaled = isinstance(method, VAF | Devils)
    assert notes == ([f"{type(method).__name__} layers={[*layers]}"] if scaled else [])


def test_published_settings() -> None:
    assert (PAI.paper().alpha, PAI.release().alpha, PAI.release().semantics) == (
        0.2,
        0.5,
        "release",
    )
    assert (VAF().visual, VAF().system) == (1.15, 0.95)
    assert (Devils().alpha, ADHH("0:0").tau) == (0.5, 0.4)


BAD = [
    (lambda: PAI(1.5), "PAI alpha: found 1.5, expected at most 1, since beyond it negative scores"),
    (lambda: PAI(semantics="both"), "PAI semantics: found 'both', expected"),
    (lambda: VAF(visual=-1), "VAF visual: found -1, expected a finite number of at least 0"),
    (lambda: Devils(-0.1), "Devils alpha: found -0.1, expected a finite number of at least 0"),
    (lambda: ADHH(), "ADHH heads: found none, expected the heads that hallucinate"),
    (lambda: ADHH("0:0", tau=2), "ADHH tau: found 2, expected a number from 0 to 1"),
    (lambda: MassTarget(0), "MassTarget mass: found 0, expected a number from 0 to 1"),
    (lambda: MassTarget(1), "MassTarget mass: found 1, expected less, so that text is seen"),
    (lambda: wrap(planted("llava"), "adhh"), "ADHH heads: found none"),
    (
        lambda: wrap(planted("llava"), ADHH("1:0,9")),
        "ADHH heads: head 9 is out of range: this model has 4 heads, 0 to 3",
    ),
]


@pytest.mark.parametrize(("make", "text"), BAD, ids=[text for _, text in BAD])
def test_wrong_values(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match="^" + text.replace("(", r"\(")):
        make()


def test_the_heads_of_ad_hh_are_its_own() -> None:
    model = planted("llava")
    with wrap(model, ADHH("1:0,3; 2:1")) as patch:
        assert patch.heads["adhh"].nonzero().tolist() == [[1, 0], [1, 3], [2, 1]]
    with wrap(model, ADHH("1:0,3; 2:1"), heads={"adhh": "3:2"}) as patch:
        assert patch.heads["adhh"].nonzero().tolist() == [[3, 2]]


# ---- rows and layers


def run(model: nn.Module, *methods: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits `[B, S, V]` of a prompt, and what enters the output projection of every layer."""
    entering: list[Tensor] = []
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        for block in model.get_decoder().layers
    ]
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with torch.no_grad():
        if methods:
            with wrap(model, *methods):
                logits = model(**batch).logits
        else:
            logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    return logits, entering


NOTHING = (PAI(0.0), VAF(1.0, 1.0), Devils(0.0), ADHH("1-3:*", 1.0))


@pytest.mark.parametrize("method", NOTHING, ids=lambda method: method.name)
def test_without_strength_it_is_the_stock_model(method: Any) -> None:
    """Bit for bit, but for AD-HH, which computes its rows to ask them."""
    model = planted("llava")
    stock, found = run(model)[0], run(model, method)[0]
    if method.name == "adhh":
        torch.testing.assert_close(found, stock, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, stock)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "method",
    [PAI(layers=(2, 3)), Devils(layers=(2, 3)), ADHH("2-3:*"), MassTarget(layers=(2, 3))],
    ids=lambda method: method.name,
)
def test_rows_before_the_last_and_layers_below_are_untouched(method: Any, attn: str) -> None:
    model = tiny.plant(tiny.llava(attn=attn))
    logits, entering = run(model)
    edited, after = run(model, method)
    text = tiny.inputs(model, tiny.BATCH_OF_3)["attention_mask"].bool()[:, :-1]  # no padding
    assert torch.equal(edited[:, :-1][text], logits[:, :-1][text])
    assert not torch.equal(edited[:, -1], logits[:, -1])
    for layer, (one, other) in enumerate(zip(after, entering, strict=True)):
        assert torch.equal(one[:, :-1][text], other[:, :-1][text])
        assert torch.equal(one[:, -1], other[:, -1]) == (layer < 2)


def test_vaf_edits_every_row_of_text_behind_the_image() -> None:
    model = planted("llava")
    logits, _ = run(model)
    found, _ = run(model, VAF(1.5, 0.5, layers=(1, 2)))
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    image = batch["input_ids"] == tiny.IMAGE
    behind = ~image & (image.cumsum(1) > 0)
    kept = batch["attention_mask"].bool() & ~behind
    assert torch.equal(found[kept], logits[kept])
    assert ((found - logits).abs().amax(-1) > 1e-4)[behind].all()


def test_the_release_of_pai_leaves_the_prompt_alone() -> None:
    model = planted("llava")
    assert torch.equal(run(model)[0], run(model, PAI.release())[0])


def test_a_target_is_what_the_model_shows() -> None:
    model = tiny.plant(tiny.llava(attn="eager"))
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    image = (batch["input_ids"] == tiny.IMAGE)[:, None]
    with wrap(model, MassTarget(0.37, layers=(2,))), torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[2][:, :, -1]
    assert_near((weights * image).sum(-1), [[0.37] * 4] * 3)
