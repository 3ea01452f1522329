"""Models that do something in another way than most: their own `generate`, cross-attention, linear
attention, separators and row ends inside an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import vlm_patch
from eval.support import tiny
from eval.support.build import build
from eval.support.families import quietly
from eval.support.prompts import around, images, prompt, tokens
from eval.support.sizes import BOS, IMAGE, PAD, VIDEO
from tests.support.agreement import NO_PROCESSOR
from vlm_patch import GIFT, VAR, VHR, PatchError, UnsupportedModelError
from vlm_patch.method import ForwardContext, Method, State
from vlm_patch.primitives.sinks import one_stream

DICT = {"do_sample": False, "return_dict_in_generate": True}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:no published settings")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quietly():
        yield


@dataclass(frozen=True, eq=False)
class Seen(Method):
    """Keeps the masks of every prompt."""

    name: ClassVar[str] = "seen"
    reads_question: ClassVar[bool] = True
    words: str = "all"
    masks: list[ForwardContext] = field(default_factory=list)

    def before_forward(self, forward: ForwardContext, state: State) -> None:
        if forward.position.past == 0:
            self.masks.append(forward)


def masks(model: Any, inputs: dict[str, Any], **options: Any) -> ForwardContext:
    """What is image, text and question in a prompt that the model generates from."""
    seen = Seen()
    with vlm_patch.wrap(model, seen):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
    return seen.masks[0]


# ---- models that generate by a part of themselves


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_a_caption_without_a_prompt(kind: str) -> None:
    """The model itself writes the placeholders and BOS."""
    model = build(kind)
    inputs = prompt(kind, model, 0, "tensor")
    del inputs["input_ids"], inputs["attention_mask"]
    found = masks(model, inputs)
    assert found.image.tolist() == [[True] * 16 + [False]] * 2
    assert found.text.tolist() == [[False] * 16 + [True]] * 2


@pytest.mark.parametrize("kind", ["blip-2", "instructblip", "instructblipvideo", "kosmos-2"])
def test_beams_and_return_sequences(kind: str) -> None:
    """Each prompt's masks are repeated, next to each other."""
    model = build(kind)
    inputs = prompt(kind, model, 0, "tensor")
    token = VIDEO if kind == "instructblipvideo" else IMAGE
    expected = (inputs["input_ids"] == token).repeat_interleave(2, 0)
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        seen = Seen()
        with vlm_patch.wrap(model, seen):
            model.generate(**inputs, max_new_tokens=2, **options)
        assert torch.equal(seen.masks[0].image, expected)
        assert torch.equal(seen.masks[0].query, seen.masks[0].text)


def test_beams_that_stay_together_answer_as_greedy() -> None:
    """One beam's answer under all methods, and the same prompt repeated by hand."""
    model = build("instructblip")
    inputs = prompt("instructblip", model, 0, "tensor")
    twice = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    methods = (VAR(dims=(3,), tau=1.0, min_image_mass=0.0), GIFT(), VHR())
    with vlm_patch.wrap(model, *methods):
        one = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        two = model.generate(**twice, max_new_tokens=4, do_sample=False)
    assert torch.equal(one.repeat_interleave(2, 0), two)


def test_a_question_by_hand() -> None:
    model = build("instructblip")
    inputs = prompt("instructblip", model, 0, "tensor")
    query = inputs["input_ids"] == 13
    seen = Seen()
    with vlm_patch.wrap(model, seen) as patch, patch.prompt(query=query):
        model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(seen.masks[0].query, query)


@pytest.mark.parametrize("kind", ["instructblip", "paligemma", "kosmos-2"])
def test_a_bare_question_behind_the_image(kind: str) -> None:
    """No chat template: BOS and white space around the text do not belong to the question."""
    model, words = build(kind), tiny.tokenizer()
    question = words("Is there a dog in the image ? \n", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*[IMAGE] * 16, BOS, *question]] * 2)
    inputs = around(kind, model, ids) | images(kind, model, 0, "tensor")
    seen = Seen(words="content")
    with vlm_patch.wrap(model, seen, processor=SimpleNamespace(tokenizer=words)):
        model.generate(**inputs, max_new_tokens=2)
    (forward,) = seen.masks
    asked = ids[forward.query].view(2, -1)
    assert words.decode(asked[0]) == "Is there a dog in the image ?"
    content = [words.decode([token]) for token in ids[forward.content].view(2, -1)[1]]
    assert content == ["dog", "image"]


def test_its_language_model_is_not_called_behind_its_back() -> None:
    """Embeddings given to the inner model directly say nothing of images."""
    model = build("instructblip")
    embeds = model.get_input_embeddings()(tokens())
    with vlm_patch.wrap(model, VHR()):
        model.generate(**prompt("instructblip", model, 0, "tensor"), max_new_tokens=2)
        with pytest.raises(PatchError, match="the image tokens of this prompt cannot be told"):
            model.language_model(inputs_embeds=embeds)


@pytest.mark.parametrize("kind", ["instructblip", "kosmos-2"])
def test_generate_is_given_back(kind: str) -> None:
    model = build(kind)
    part = model.language_model if kind == "instructblip" else model.text_model
    with vlm_patch.wrap(model, VHR()):
        assert "generate" in part.__dict__
        assert "generate" not in model.__dict__
        with pytest.raises(PatchError, match="dola_layers='low'"):
            model.generate(**prompt(kind, model, 0, "tensor"), dola_layers="low")
    assert "generate" not in part.__dict__


def test_a_raw_forward_of_the_whole_model() -> None:
    model = build("instructblip")
    inputs = prompt("instructblip", model, 0, "tensor")
    seen = Seen()
    with vlm_patch.wrap(model, seen), torch.no_grad():
        model(**inputs)
    assert torch.equal(seen.masks[0].image, inputs["input_ids"] == IMAGE)


# ---- cross-attention


def test_mllama_takes_vhr_in_its_own_attention_alone() -> None:
    model = build("mllama")
    inputs = prompt("mllama", model, 0, "tensor")
    with vlm_patch.wrap(model, VHR(layers=(0, 2))) as patch:
        assert "softmax attention in 0, 2" in patch.describe()
        patched = model.generate(**inputs, max_new_tokens=3, output_logits=True)
    for name, reason in (
        ("var", "which have no residual stream to find sinks in"),
        ("gift", "so no question could keep pace with them"),
    ):
        with pytest.raises(UnsupportedModelError) as error:
            vlm_patch.wrap(model, name)
        assert str(error.value) == (
            f"{name} is not supported on this model: its cross-attention holds image keys alone, "
            f"{reason}"
        )
    with pytest.raises(ValueError, match="found 1, a layer without softmax attention; this model"):
        vlm_patch.wrap(model, VHR(layers=(1,)))
    assert not torch.equal(patched, model.generate(**inputs, max_new_tokens=3))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "idefics",
            "IdeficsForVisionText2Text is not supported: its cross-attention holds image keys "
            "alone, and its config does not name the tokens that stand for images",
        ),
        (
            "git",
            "GitForCausalLM is not supported: its attention does not go through transformers' "
            "interface",
        ),
        (
            "mistral_large4",
            "the attention of MistralLarge4ForConditionalGeneration cannot be reached: no layer of "
            "MistralLarge4TextModel goes through transformers' attention interface (remote code, "
            "an old implementation, or sparse attention that picks its keys by an index)",
        ),
        (
            "udop",
            "UdopForConditionalGeneration looks at the image through cross-attention; this version "
            "edits decoders that hold the image among their own tokens",
        ),
    ],
)
def test_models_that_are_refused(kind: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        vlm_patch.wrap(build(kind), VHR())
    assert str(error.value) == message


def test_a_gain_that_would_be_normed_away() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"vhr is not supported .* normalises each head"
    ):
        vlm_patch.wrap(build("muse_spark"), "vhr")


def test_sparse_layers_between_full_ones_are_left_alone() -> None:
    """Such a layer asks for its function's name and would skip its index under another one."""
    model = build("minimax_m3_vl")
    model.get_decoder().layers[1].self_attn.indexer = torch.nn.Identity()
    with vlm_patch.wrap(model, VHR(layers=(2,))) as patch:
        assert "softmax attention in 0, 2" in patch.describe()


# ---- linear attention


def hybrid() -> Any:
    """Qwen3.5 of 8 layers, every fourth of them with softmax attention."""
    small = build("qwen3_5")
    text = small.config.text_config
    text.layer_types = (["linear_attention"] * 3 + ["full_attention"]) * 2
    text.num_hidden_layers = 8
    return type(small)(small.config).eval()


def test_default_layers_fall_on_softmax_attention() -> None:
    model = hybrid()
    scaled = (
        r"no published settings for a qwen3_5_text of 8 layers .*: GIFT alpha=4.0, "
        r"GIFT layers=\(3,\), GIFT saliency_layer=3, VHR layers=\[7\]\."
    )
    with (
        pytest.warns(UserWarning, match=scaled),
        vlm_patch.wrap(model, "var", "gift", "vhr") as patch,
    ):
        lines = patch.describe().splitlines()
    assert lines[0].endswith("Qwen3_5TextModel, 8 layers x 4 heads, softmax attention in 3, 7")
    assert [line.rpartition(": ")[2] for line in lines[1:]] == [
        "on in layers 3; looks for its sinks at the first prompt",
        "on in layers 3",
        "on in layers 7; its extra prompt takes a forward of its own, since some layers have no "
        "softmax attention over the text's own tokens",
    ]


def test_the_defaults_work_on_the_first_prompt() -> None:
    """GIFT reads its map in the layer that it enhances, of a cache that cannot be cut."""
    model = build("qwen3_5")
    inputs = prompt("qwen3_5", model, 0, "list")
    stock = model.generate(**inputs, max_new_tokens=3, output_logits=True, **DICT).logits[0]
    with vlm_patch.wrap(model, GIFT(alpha=5.0)):
        found = model.generate(**inputs, max_new_tokens=3, output_logits=True, **DICT).logits[0]
    assert (found - stock).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (GIFT(saliency_layer=2), "GIFT saliency_layer: found 2, a layer without softmax attention"),
        (GIFT(layers=[3, 4]), "GIFT layers: found 4, a layer without softmax attention"),
        (VHR(layers=[0, 7]), "VHR layers: found 0, a layer without softmax attention"),
        (VHR(layers=[8]), "VHR layers: found 8, but this model has only 0 to 7"),
    ],
)
def test_layers_without_softmax_are_refused(method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vlm_patch.wrap(hybrid(), method)


def test_a_range_of_layers_means_those_with_softmax() -> None:
    with vlm_patch.wrap(hybrid(), VAR(exclude_last_layer=False), layers="2-7") as patch:
        table = patch.heads["var"].any(1)
        assert table.nonzero().flatten().tolist() == [3, 7]


def test_heads_of_linear_layers_are_said_to_be_off() -> None:
    said = (
        "vhr is off in layers 0-2, 4-6, which have no softmax attention on this model; "
        "layers 3, 7 have it"
    )
    with pytest.warns(UserWarning, match=said):
        patch = vlm_patch.wrap(hybrid(), VHR(), heads="all")
    assert patch.heads["vhr"].any(1).nonzero().flatten().tolist() == [3, 7]
    patch.remove()


def test_one_layer_is_too_few_to_find_sinks_in() -> None:
    model = build("qwen3_5")
    with (
        vlm_patch.wrap(model, VAR()),
        pytest.warns(
            UserWarning, match="VAR does nothing on this model: no attention sink was found"
        ),
    ):
        model.generate(**prompt("qwen3_5", model, 0, "list"), max_new_tokens=1)


def test_several_residual_streams_have_no_sinks() -> None:
    """Gemma 3n and GLM-5 pass on several streams at once."""
    with pytest.raises(UnsupportedModelError, match=r"several at once, of shape \[2, 5, 4, 8\]"):
        one_stream(torch.zeros(2, 5, 4, 8))
    assert one_stream(hidden := torch.zeros(2, 5, 8)) is hidden


# ---- image and no image


def test_separators_inside_an_image_are_text() -> None:
    """As [IMG_BREAK] of Pixtral: a row that VAR edits, a key that is not image, no question."""
    model, separator = build("llava"), 50
    ids = torch.tensor([[BOS, 5, *[IMAGE] * 8, separator, *[IMAGE] * 8, 20, 21]])
    inputs = prompt("llava", model, 0, "list")
    features = inputs["mm_encoder_outputs"]["image"]
    features["pooler_output"] = features["pooler_output"][:1]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = masks(model, inputs)
    assert torch.equal(found.image, ids == IMAGE)
    assert torch.equal(found.text, torch.isin(ids, torch.tensor([separator, 20, 21])))
    assert torch.equal(found.query, torch.isin(ids, torch.tensor([20, 21])))


def test_row_ends_of_llava_next_are_image() -> None:
    """Two crops side by side: 2 x 2 tokens of the whole, then 2 rows of 4 tokens and a row end."""
    model = build("llava_next", image_grid_pinpoints=[[32, 64]], vision_config=VISION)
    torch.nn.init.normal_(model.model.image_newline)
    ids = tokens(14)
    pixels = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[32, 64]] * 2),
    }
    found = masks(model, inputs)
    assert torch.equal(found.image, ids == IMAGE)
    embeds = found.inputs["inputs_embeds"]
    ends = (embeds == model.model.image_newline).all(-1)
    assert ends[found.image].view(2, 14).nonzero().tolist() == [[0, 8], [0, 13], [1, 8], [1, 13]]


def test_separators_of_ovis2_are_image() -> None:
    """They are embedded on the vision side, by its own table."""
    model = build("ovis2")
    inputs = prompt("ovis2", model, 0, "tensor")
    found = masks(model, inputs)
    assert torch.equal(found.image, torch.isin(inputs["input_ids"], torch.tensor([IMAGE, 11, 21])))


def test_the_image_token_of_phi4_stands_in_its_vision_config() -> None:
    model = build("phi4_multimodal")
    assert not hasattr(model.config, "image_token_id")
    inputs = prompt("phi4_multimodal", model, 0, "tensor")
    found = masks(model, inputs)
    assert torch.equal(found.image, inputs["input_ids"] == IMAGE)


@pytest.mark.parametrize("name", ["image_patches", "pixel_values"])
def test_the_patches_of_fuyu_are_images(name: str) -> None:
    model = build("fuyu")
    ids = tokens()
    size = 3 * model.config.patch_size**2
    patches = torch.randn(2, 16, size, generator=torch.Generator().manual_seed(0))
    seen = Seen()
    with vlm_patch.wrap(model, seen), torch.no_grad():
        model(input_ids=ids, attention_mask=(ids != PAD).long(), **{name: patches})
    assert torch.equal(seen.masks[0].image, ids == IMAGE)
