"""Edits of logits: they act in every way of decoding, share streams, and say where they cannot act.

Their values are held against the slow reference in tests/eval/support/test_modes.py and
tests/engine/test_fuzz.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from eval.support import tiny
from eval.support.agreement import ours, own_forwards, planted
from eval.support.build import build
from eval.support.check import Subject
from eval.support.ways import CLOSE, SIDES, generate, measure, off, prompt
from tests.support.agreement import NO_PROCESSOR
from vlm_patch import (
    ICD,
    M3ID,
    PAINT,
    VAR,
    VCD,
    Branch,
    DeCo,
    DoLa,
    Method,
    PatchError,
    UnsupportedModelError,
    wrap,
)
from vlm_patch.method import ForwardContext

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)
CLOSED = ("m3id", "paint-guided")
STREAMS = {"no image", "vcd", "icd"}
NAMES = ("vcd", "icd", "m3id", "dola", "deco", "paint-guided")
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 2, "do_sample": True},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def model_of() -> Any:
    return planted("llava")


def first_step(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """The model's logits `[B, V]` for the first new token."""
    torch.manual_seed(0)
    with own_forwards(model) as seen:
        generate(model, batch, 2, **options)
    output: Tensor = seen[0][1].logits
    rows = batch["input_ids"].shape[1]
    return output[:, -1 if output.shape[1] == 1 else rows - 1 - (rows - output.shape[1])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", DECODING)
def test_never_inactive(way: str, name: str) -> None:
    """The field's best-known bug: a contrast that only sampling sees."""
    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    stock = first_step(model, batch, **DECODING[way])
    with wrap(model, *ours([name])):
        edited = first_step(model, batch, **DECODING[way])
        with torch.no_grad():
            own = model(**batch).logits[:, -1]
    assert not torch.allclose(edited, stock, atol=1e-3)
    kept = edited[:1].isfinite()  # generate takes tokens out of the logits of drafts
    torch.testing.assert_close(edited[:1][kept], own[kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        VCD(alpha=0.0, beta=0.0),
        ICD(alpha=0.0, beta=0.0, prefix=(5, 6)),
        M3ID(decay=0.0),
        DeCo(layers=(1,), alpha=0.0, top_p=1.0, top_k=10**6),
        PAINT(alpha=0.0, beta=0.0, layers=(1,), gamma=1.0),
    ],
    ids=lambda method: method.name,
)
def test_strength_0_is_the_stock_model(method: Method) -> None:
    model = model_of()
    batch = prompt(model, tiny.BATCH_OF_3)
    with torch.no_grad():
        stock = model(**batch).logits
        with wrap(model, method):
            found = model(**batch).logits
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-6)


def test_only_the_last_row_of_a_prompt() -> None:
    """Of all logits, of the last few, and of the last one."""
    model = model_of()
    batch = prompt(model, tiny.BATCH_OF_3)
    with torch.no_grad():
        stock = model(**batch).logits
        with wrap(model, VCD(alpha=0.5)):
            whole, few, one = (model(**batch, logits_to_keep=n).logits for n in (0, 3, 1))
    assert torch.equal(whole[:, :-1], stock[:, :-1])
    torch.testing.assert_close(few[:, -1:], whole[:, -1:])
    torch.testing.assert_close(one, whole[:, -1:])
    assert torch.equal(few[:, :-1], stock[:, -3:-1])


def test_prompts_without_an_image_stay_stock() -> None:
    model = model_of()
    rows = [tiny.ONE_IMAGE[0], [tiny.BOS, 5, 6, 21, 22, 23, 24]]
    batch = prompt(model, rows)
    positions = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        stock = model(**batch, **positions).logits
        with wrap(model, *ours(["m3id", "deco"])), pytest.warns(UserWarning, match="no image"):
            found = model(**batch, **positions).logits
    assert torch.equal(found[1], stock[1])
    assert found[0, -1].isinf().any()


class Decodings:
    """Counts the forwards of the decoder, with their rows and samples."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))


def test_one_stream_for_all_that_want_the_same() -> None:
    """PAINT's contrast and M3ID's: its prompt without the image, its tokens in the same batch."""
    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    length = batch["input_ids"].shape[1]
    text = int((batch["input_ids"] != tiny.IMAGE).sum())
    methods = PAINT(layers=(1, 2), gamma=1.1), M3ID()
    with wrap(model, *methods):
        count = Decodings(model)
        generate(model, batch, 3)
    assert count.shapes == [(1, length), (1, text), (2, 1), (2, 1)]


@pytest.mark.parametrize("kind", ["llava", "qwen2-vl"])
@pytest.mark.parametrize(
    "names", [("vcd",), ("icd", "paint-guided", "dola"), ("gift", "m3id", "vhr", "vcd")]
)
def test_one_batch_gives_what_streams_apart_give(
    names: tuple[str, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods inside the layers act in the first stream alone."""
    model = planted(kind)
    batch = prompt(model, tiny.MIXED_BATCH)
    with wrap(model, *ours(names)):
        count = Decodings(model)
        joint = generate(model, batch, 5)
        monkeypatch.setattr("vlm_patch.engine.logits.can_join", lambda *_: False)
        apart = generate(model, batch, 5)
    streams = 1 + len({"no image" if name in CLOSED else name for name in names} & STREAMS)
    assert count.shapes.count((len(batch["input_ids"]) * streams, 1)) == 4
    assert torch.equal(joint.sequences, apart.sequences)
    for one, other in zip(joint.logits, apart.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"output_attentions": True},
        {"output_hidden_states": True},
    ],
    ids=str,
)
def test_streams_run_apart_where_one_batch_would_show(options: dict[str, Any]) -> None:
    model = planted("llava", attn="eager" if "output_attentions" in options else "sdpa")
    batch = prompt(model, tiny.ONE_IMAGE)
    with wrap(model, *ours(["vcd"])):
        count = Decodings(model)
        generate(model, batch, 3, **options)
    assert count.shapes[2:] == [(1, 1)] * 4


def test_no_stream_and_no_hook_without_a_contrast() -> None:
    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    with wrap(model, PAINT(layers=(1, 2))):
        assert not model._forward_hooks
        count = Decodings(model)
        generate(model, batch, 3)
    assert len(count.shapes) == 3


def test_attention_is_the_stock_kernels_where_only_logits_are_edited() -> None:
    """An early layer is read without an edit, and the embedding of the image stays what it was."""
    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    with torch.no_grad():
        stock = model(**batch, output_hidden_states=True).hidden_states
        with wrap(model, DoLa(layers=(0, 1)), VCD()):
            found = model(**batch, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, stock, found))


@dataclass(frozen=True)
class Keep(Method):
    """Edits nothing; keeps what it is shown."""

    name: ClassVar[str] = "keep"

    def branches(self) -> Mapping[str, Branch]:
        return {"other": Branch(image=False)}

    def early_layers(self) -> tuple[int, ...]:
        return (1,)

    def edit_logits(
        self,
        logits: Tensor,
        others: Mapping[str | int, Tensor],
        forward: ForwardContext,
        state: Any,
    ) -> Tensor:
        SHOWN.append({**others, "own": logits})
        return logits


SHOWN: list[dict[str | int, Tensor]] = []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_method_is_shown(dtype: torch.dtype) -> None:
    """In float32, for one row a sample, both by name and by layer; returned, it changes no bit."""
    model = model_of().to(dtype)
    batch = prompt(model, tiny.BATCH_OF_3)
    with torch.no_grad():
        stock = model(**batch).logits
        SHOWN.clear()
        with wrap(model, Keep()):
            found = model(**batch).logits
    assert torch.equal(found, stock)
    (shown,) = SHOWN
    assert {"other", 1, "own"} == set(shown)
    assert all(of.shape == (3, 1, stock.shape[-1]) for of in shown.values())
    assert all(of.dtype == torch.float32 for of in shown.values())


def test_streams_follow_a_deep_copy_and_a_cut_of_the_cache() -> None:
    """Two continuations of one prompt, and one token taken back, give what reading anew gives."""
    import copy

    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    token = torch.tensor([[60]])
    with torch.no_grad(), wrap(model, *ours(["m3id"])):
        cache = model(**batch, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        one = model(input_ids=token, past_key_values=cache).logits
        model(input_ids=torch.tensor([[61]]), past_key_values=twin)
        twin.crop(-1)
        two = model(input_ids=token, past_key_values=twin).logits
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vcd", "icd", "m3id"])
def test_a_method_that_missed_the_prompt(name: str) -> None:
    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    with wrap(model, VAR(dims=tiny.SINK_DIMS, tau=3.0), *ours([name])) as patch, torch.no_grad():
        with patch.disabled(name):
            cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(PatchError, match="does not know the first 25 tokens: its method was"):
            model(input_ids=torch.tensor([[60]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"labels": torch.ones(1, 25, dtype=torch.long)}, "labels were given, but the loss"),
        ({"logits_to_keep": torch.tensor([3, 24])}, "logits_to_keep is a tensor of rows"),
        ({"return_dict": False}, "return_dict=False gives a tuple"),
    ],
)
def test_refused_calls(given: dict[str, Any], text: str) -> None:
    model = model_of()
    with wrap(model, DoLa()) as patch:
        with pytest.raises(PatchError, match=text):
            model(**prompt(model, tiny.ONE_IMAGE), **given)
        with patch.disabled():
            model(**prompt(model, tiny.ONE_IMAGE), **given)


def test_a_text_to_put_in_needs_the_tokenizer() -> None:
    model = model_of()
    with wrap(model, "icd"), pytest.raises(PatchError, match="takes the model's tokenizer"):
        model(**prompt(model, tiny.ONE_IMAGE))


def test_pixels_that_are_not_at_hand() -> None:
    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    features = model.get_image_features(batch.pop("pixel_values"), return_dict=True)
    with wrap(model, "vcd"), pytest.raises(PatchError, match="images of this prompt were encoded"):
        model(**batch, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("kind", ["instructblip", "qwen3_vl", "internvl"])
def test_a_stream_without_the_image_in_other_families(kind: str) -> None:
    """It is the language model alone: another image changes nothing in it."""
    subject = Subject(kind)
    shown = []
    for seed in (0, 1):
        SHOWN.clear()
        with wrap(subject.model, Keep()):
            subject.answer(seed)
        shown.append(SHOWN[0])
    assert torch.equal(shown[0]["other"], shown[1]["other"])
    assert not torch.allclose(shown[0]["own"], shown[0]["other"])


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("qwen3_vl", "icd", "whose decoder is also given visual_pos_masks"),
        ("mllama", "vcd", "whose decoder is also given cross_attention_states"),
        ("paligemma", "m3id", "tokens of its prompts look ahead"),
        ("gemma4", "icd", "its decoder takes inputs for every token and layer"),
    ],
)
def test_families_in_which_a_stream_would_be_another(kind: str, name: str, text: str) -> None:
    subject = Subject(kind)
    with wrap(subject.model, *ours([name])), pytest.raises(PatchError, match=text):
        subject.answer()


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("kosmos-2", "m3id", "its decoder counts positions by itself"),
        ("kosmos-2", "dola", "has no norm behind its last block"),
        ("instructblip", "vcd", "it generates from embeddings"),
    ],
)
def test_families_refused_at_wrap(kind: str, name: str, text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        wrap(build(kind), name)


def test_an_early_layer_that_is_not_there() -> None:
    @dataclass(frozen=True)
    class Late(Keep):
        name: ClassVar[str] = "late"

        def early_layers(self) -> tuple[int, ...]:
            return (4,)

    with pytest.raises(ValueError, match="late reads layer 4 early, but this model has layers"):
        wrap(model_of(), Late())


def test_heads_of_a_method_that_has_none() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="heads: found 'vcd', which edits logits"):
        wrap(model, "vcd", heads={"vcd": "1:0"})
    with wrap(model, "vcd", VAR(dims=(3,), tau=3.0), layers=[1]) as patch:
        assert "VCD(alpha=1.0, beta=0.1, noise_step=500, seed=0): on the logits" in str(patch)
        with patch.disabled("vcd"):
            assert "on the logits, disabled at the moment" in str(patch)


def test_a_second_prompt_on_the_same_cache_object() -> None:
    """A conversation that starts again is a new stream."""
    model = model_of()
    batch = prompt(model, tiny.ONE_IMAGE)
    with torch.no_grad(), wrap(model, *ours(["m3id"])):
        first = model(**batch, past_key_values=DynamicCache(config=model.config)).logits
        cache = DynamicCache(config=model.config)
        model(**batch, past_key_values=cache)
        cache.reset()
        again = model(**batch, past_key_values=cache).logits
    assert torch.equal(first, again)


@pytest.mark.parametrize("side", [side for side, names in SIDES.items() if names[0] in NAMES])
@pytest.mark.parametrize("name", ["beams", "prompt lookup", "static cache", "raw forward"])
def test_against_the_reference(name: str, side: str) -> None:
    row = measure(name, side)
    assert row.max_error is not None
    assert row.ok, row


def test_half_precision_keeps_the_type() -> None:
    model = model_of().to(torch.bfloat16)
    batch = prompt(model, tiny.ONE_IMAGE)
    with wrap(model, *ours(["vcd"])):
        output = model(**batch)
        generate(model, batch, 2)
    assert output.logits.dtype == torch.bfloat16


def test_a_batch_of_beams_that_is_repeated() -> None:
    """One image, two beams of each of three prompts: the stream's samples follow them."""
    model = model_of()
    batch = prompt(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(["icd"])):
        output = generate(model, batch, 4)
    assert off(model, batch, output, ["icd"]) <= CLOSE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("names", [("vhr", "vcd", "m3id"), ("vhr", "dola"), ("gift", "vhr", "vcd")])
def test_beside_a_prompt_that_rides_in_the_first_ones_forward(
    names: Sequence[str], cache: str
) -> None:
    """VHR's, whose rows stand behind those that logits are made of; on a static cache it has a
    forward of its own.
    """
    model = model_of()
    batch = prompt(model, tiny.BATCH_OF_3)
    with wrap(model, *ours(names)) as patch:
        output = generate(model, batch, cache_implementation=cache)
        rides = "its extra prompt shares the prompt's forward" in patch.describe()
    assert rides == (cache == "dynamic")
    assert off(model, batch, output, names) <= CLOSE
