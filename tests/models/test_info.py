"""What the library reads of a model, on tiny ones of several families; on the meta device."""

import types
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

from eval.support import tiny
from vlm_patch import UnsupportedModelError
from vlm_patch.models.info import inspect_model
from vlm_patch.models.published import PROFILES

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER = VISION | {"vocab_size": 120}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}


def llava() -> nn.Module:
    vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**TEXT)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    return hf.LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    vision, text = hf.CLIPVisionConfig(**VISION), hf.MistralConfig(**TEXT)
    config = hf.LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=99)
    return hf.LlavaNextForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8}
    text = TEXT | {"rope_scaling": ROPE, "rope_theta": 10000.0}
    config = hf.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=99, video_token_id=98
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "patch_size": 8}
    text = TEXT | {"rope_scaling": ROPE, "rope_theta": 10000.0}
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=99, video_token_id=98
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def idefics3() -> nn.Module:
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=99
    )
    return hf.Idefics3ForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=99
    )
    return hf.SmolVLMForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = hf.Gemma3Config(
        text_config=TEXT | {"head_dim": 16},
        vision_config=VISION,
        image_token_index=99,
        mm_tokens_per_image=4,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def internvl() -> nn.Module:
    vision = VISION | {"image_size": [32, 32], "patch_size": [8, 8]}
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT), vision_config=vision, image_token_id=99
    )
    return hf.InternVLForConditionalGeneration(config)


FAMILIES: list[tuple[Callable[[], nn.Module], str, str, tuple[int, ...]]] = [
    (llava, "LlamaModel", "llama", (99,)),
    (llava_next, "MistralModel", "mistral", (99,)),
    (qwen2_vl, "Qwen2VLTextModel", "qwen2_vl_text", (99, 98)),
    (qwen2_5_vl, "Qwen2_5_VLTextModel", "qwen2_5_vl_text", (99, 98)),
    (idefics3, "LlamaModel", "llama", (99,)),
    (smolvlm, "LlamaModel", "llama", (99,)),
    (gemma3, "Gemma3TextModel", "gemma3_text", (99,)),
    (internvl, "Qwen2Model", "qwen2", (99,)),
]


@pytest.mark.parametrize(
    ("build", "decoder", "kind", "image_ids"), FAMILIES, ids=[row[0].__name__ for row in FAMILIES]
)
def test_a_family(
    build: Callable[[], nn.Module], decoder: str, kind: str, image_ids: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = build()
    found = inspect_model(model)
    assert found.module in model.get_decoder().modules()
    assert (type(found.module).__name__, found.kind) == (decoder, kind)
    assert (found.depth, found.heads, found.width) == (3, 4, 64)
    assert found.image_ids == image_ids
    assert found.profile == {}
    assert [layer.index for layer in found.layers] == [0, 1, 2]
    for layer, block in zip(found.layers, found.module.layers, strict=True):
        assert layer.block is block
        assert layer.attention is block.self_attn


def test_the_vision_tower_is_left_alone() -> None:
    with torch.device("meta"):
        model = internvl()
    attention = {layer.attention for layer in inspect_model(model).layers}
    assert not attention & set(model.model.vision_tower.modules())


def test_every_profile_is_found_by_the_shape_of_its_decoder() -> None:
    shapes = [(p.decoder, p.depth, p.width, p.key_value_heads, p.vlm) for p in PROFILES]
    assert shapes == [
        ("llama", 32, 4096, 32, "instructblip"),
        ("llama", 32, 4096, 32, None),
        ("llama", 40, 5120, 40, None),
        ("llama", 32, 4096, 8, None),
        ("mistral", 32, 4096, 8, None),
        ("qwen2_vl_text", 28, 3584, 4, None),
    ]


# ---- refusals


def refusal(model: object) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        inspect_model(model)
    return str(error.value)


def text_only() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(hf.T5Config(d_model=32, d_ff=32, num_layers=1))


def blip2() -> nn.Module:
    text = hf.OPTConfig(hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    config = hf.Blip2Config(
        text_config=text.to_dict(),
        vision_config=VISION,
        qformer_config=QFORMER,
        image_token_index=99,
    )
    return hf.Blip2ForConditionalGeneration(config)


def instructblip() -> nn.Module:
    config = hf.InstructBlipConfig(
        text_config=hf.LlamaConfig(**TEXT).to_dict(),
        vision_config=VISION,
        qformer_config=QFORMER,
        image_token_index=99,
    )
    return hf.InstructBlipForConditionalGeneration(config)


def instructblip_t5() -> nn.Module:
    config = hf.InstructBlipConfig(
        text_config=hf.T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=4).to_dict(),
        vision_config=VISION,
        qformer_config=QFORMER,
        image_token_index=99,
    )
    return hf.InstructBlipForConditionalGeneration(config)


def mllama() -> nn.Module:
    vision = VISION | {"num_global_layers": 1, "intermediate_layers_indices": [0, 1]}
    config = hf.MllamaConfig(
        text_config=TEXT
        | {"cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}},
        vision_config=vision | {"vision_output_dim": 96},
        image_token_index=99,
    )
    return hf.MllamaForConditionalGeneration(config)


def florence2() -> nn.Module:
    return hf.Florence2ForConditionalGeneration(hf.Florence2Config(image_token_id=99))


NO_VLM = (
    "is no vision-language model: its config names no image_token_id. "
    "Load it with AutoModelForImageTextToText."
)
CROSS = (
    "looks at the image through cross-attention; this version edits decoders that hold the image "
    "among their own tokens"
)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (text_only, NO_VLM),
        (t5, NO_VLM),
        (instructblip_t5, CROSS),
        (florence2, CROSS),
    ],
    ids=["text_only", "t5", "instructblip_t5", "florence2"],
)
def test_a_model_that_cannot_be_patched(build: Callable[[], nn.Module], reason: str) -> None:
    with torch.device("meta"):
        model = build()
    assert refusal(model) == f"{type(model).__name__} {reason}"


@pytest.mark.parametrize(
    ("thing", "name"), [(nn.Linear(2, 2), "Linear"), (None, "NoneType"), ("llava", "str")]
)
def test_something_that_is_no_model(thing: object, name: str) -> None:
    assert refusal(thing) == (
        f"{name} is no transformers model: expected a vision-language model such as "
        "AutoModelForImageTextToText.from_pretrained(...) gives"
    )


def test_a_part_of_a_model() -> None:
    assert refusal(tiny.llava().model) == (
        "LlavaModel cannot generate, so it is only a part of a model: wrap the whole one, such as "
        "AutoModelForImageTextToText.from_pretrained(...) gives"
    )


def test_attention_that_does_not_ask_for_its_function() -> None:
    class Remote(nn.Module):
        def __init__(self, stock: nn.Module) -> None:
            super().__init__()
            self.layer_idx, self.config = stock.layer_idx, stock.config

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    model = tiny.llava()
    for block in model.get_decoder().layers:
        block.self_attn = Remote(block.self_attn)
    assert refusal(model) == (
        "the attention of LlavaForConditionalGeneration cannot be reached: no layer of LlamaModel "
        "goes through transformers' attention interface (remote code, an old implementation, or "
        "sparse attention that picks its keys by an index)"
    )


def test_an_attention_outside_of_a_list_of_layers() -> None:
    model = tiny.llava()
    decoder = model.get_decoder()
    decoder.extra = decoder.layers[0].self_attn
    decoder.layers = nn.ModuleList()
    assert refusal(model) == "attention 'extra' does not stand in a list of layers"


def test_layers_without_softmax_attention_are_passed_over() -> None:
    """As in hybrid decoders, where only some layers are ordinary attention."""
    model = tiny.llava()
    del model.get_decoder().layers[1].self_attn
    assert [layer.index for layer in inspect_model(model).layers] == [0, 2, 3]


def test_a_replaced_forward_of_one_instance_does_not_matter() -> None:
    """Quantisation and offloading put their own forward on instances."""
    model = tiny.llava()
    for block in model.get_decoder().layers:
        own = block.self_attn.forward
        block.self_attn.forward = types.MethodType(lambda self, *a, own=own, **k: own(*a, **k), own)
    assert [layer.index for layer in inspect_model(model).layers] == [0, 1, 2, 3]
