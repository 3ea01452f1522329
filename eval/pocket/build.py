"""Tokenizer, processor and untrained model of the pocket LLaVA, made by explicit rules."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from eval.pocket.glyphs import SIDE
from eval.pocket.language import vocabulary_text

PATCH = 12
IMAGE_TOKENS = (SIDE // PATCH) ** 2
"""64: one token for each patch of 12 x 12 pixels."""

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WIDTH, LAYERS, HEADS = 128, 6, 8
ROPE_THETA = 1e6
TIED_LAYERS = 3
"""The first decoder layers whose keys start as their queries: heads that look for what they are."""

CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
"""LLaVA-1.5's: "USER: <image>\\n{text} ASSISTANT: {text}</s>USER: {text} ASSISTANT:"."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world's sentences, single bytes for everything else: any text
    survives the round trip. The vocabulary is a list, not the outcome of a training."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {piece for line in vocabulary_text() for piece, _ in cut.pre_tokenize_str(line)}
    words |= {piece for piece, _ in cut.pre_tokenize_str("USER: ASSISTANT: \n")}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [(piece, 0.0) for piece in SPECIAL]
    vocabulary += [(piece, -10.0) for piece in letters]
    vocabulary += [(piece, -1.0) for piece in sorted(words - set(letters))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>")))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    begin = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), begin]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor with the chat template; the image part needs no torchvision."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _config(vocabulary: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        initializer_range=WIDTH**-0.5,
        rope_theta=ROPE_THETA,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlavaConfig(  # type: ignore[call-arg]
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )


def make_model(vocabulary: int, seed: int) -> LlavaForConditionalGeneration:
    """An untrained model: weights of deviation width^-0.5, keys equal to queries in low layers."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(_config(vocabulary))
    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for out in (attention.o_proj, mlp.down_proj):
            nn.init.normal_(out.weight, std=(12 * WIDTH) ** -0.5)
    for layer in model.model.language_model.layers[:TIED_LAYERS]:
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = 1, 2, 0
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights, tokenizer and processor so that `from_pretrained(folder)` reads them, in any
    transformers since 4.57.
    """
    model.save_pretrained(folder)
    make_processor(make_tokenizer()).save_pretrained(folder)
    _name_as_before(folder)


def _name_as_before(folder: Path) -> None:
    """Gives weights and settings the names of transformers 4, which later versions read too."""
    file = folder / "model.safetensors"
    weights = {
        re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    config = _read(folder / "config.json")
    config["text_config"]["rope_theta"] = ROPE_THETA
    _write(config, folder / "config.json")
    tokenizer = _read(folder / "tokenizer_config.json")
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.pop("extra_special_tokens", None)  # a list now, a mapping then; there are none
    _write(tokenizer, folder / "tokenizer_config.json")


def _read(file: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def _write(settings: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
