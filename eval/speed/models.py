"""The models that are timed, and prompts for them.

The large ones have random weights: their output is noise, their cost is real.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from eval.pocket import CAPTION_PROMPT
from eval.pocket.measure import prompt as rendered
from eval.pocket.scenes import render, scene
from eval.runs import generate
from eval.runs.config import Config

try:
    from transformers.initialization import no_init_weights
except ImportError:  # before transformers 5
    from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined, no-redef]

LLAVA: Any = LlavaForConditionalGeneration
TEXT_BEFORE, TEXT_AFTER = 5, 64
SINK_DIMS = (3, 10)
SINKS_EVERY = 50
LLAVA_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TINY_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}


@dataclass(frozen=True)
class Dims:
    """The width of a decoder: hidden size, query and key/value heads, size of a head, MLP."""

    width: int
    heads: int
    groups: int
    head: int
    mlp: int

    def thin(self) -> Dims:
        """The same attention around linear layers that cost next to nothing."""
        return replace(self, width=64, mlp=64)


LLAVA_7B = Dims(4096, 32, 32, 128, 11008)
QWEN2_VL_7B = Dims(3584, 28, 4, 128, 18944)


@dataclass(frozen=True)
class Loaded:
    """A model, and its processor if it has one."""

    model: Any
    processor: Any = None

    @property
    def text(self) -> Any:
        """The decoder's config."""
        return self.model.config.get_text_config()


@dataclass(frozen=True)
class Prompt:
    """Inputs of a batch, and which of its tokens are image and question, bool `[B, S]`."""

    inputs: dict[str, Any]
    image: Tensor
    query: Tensor

    @property
    def batch(self) -> int:
        return len(self.image)

    def text_only(self, model: Any) -> Prompt:
        """The prompt without its image, as embeddings: what VHR's extra pass runs on."""
        keep = ~self.image[0]
        if "input_ids" in self.inputs:
            embeds = model.get_input_embeddings()(self.inputs["input_ids"])[:, keep]
        else:
            embeds = self.inputs["inputs_embeds"][:, keep]
        return Prompt({"inputs_embeds": embeds}, self.image[:, keep], self.query[:, keep])

    def cut(self, keys: int) -> Prompt:
        """The last tokens of a prompt of embeddings."""
        embeds = self.inputs["inputs_embeds"][:, -keys:]
        return Prompt({"inputs_embeds": embeds}, self.image[:, -keys:], self.query[:, -keys:])


def decoder(dims: Dims, count: int, vocabulary: int = 64) -> LlamaConfig:
    """A Llama decoder of these dimensions."""
    return LlamaConfig(
        hidden_size=dims.width,
        intermediate_size=dims.mlp,
        num_hidden_layers=count,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.groups,
        head_dim=dims.head,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )


def build(
    text: LlamaConfig,
    device: torch.device,
    vision: dict[str, Any] = TINY_VISION,
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """A LLaVA with this decoder and weights of standard deviation 0.02, drawn on `device`."""
    side = vision["image_size"] // vision["patch_size"]
    settings: Any = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_seq_length=side * side,
    )
    with device, no_init_weights():
        model = LLAVA._from_config(settings, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02, generator=generator)
            else:
                weight.fill_(1.0)
    return Loaded(model.eval())


def embedded(loaded: Loaded, keys: int, batch: int) -> Prompt:
    """A prompt of embeddings: some text, an image in which some tokens are sinks, a question."""
    width, model = loaded.text.hidden_size, loaded.model
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(batch, keys, width, generator=generator)
    embeds[:, ::SINKS_EVERY, SINK_DIMS[0]] = 1.6 * math.sqrt(width)
    image = torch.zeros(batch, keys, dtype=torch.bool)
    image[:, TEXT_BEFORE : keys - TEXT_AFTER] = True
    query = torch.zeros_like(image)
    query[:, keys - TEXT_AFTER :] = True
    device = model.device
    inputs = {"inputs_embeds": embeds.to(device, model.dtype), "logits_to_keep": 1}
    return Prompt(inputs, image.to(device), query.to(device))


def pocket(device: torch.device) -> Loaded:
    """The pocket model and its processor."""
    return Loaded(*generate.load_model(Config(dtype="float32", device=str(device))))


def described(loaded: Loaded, batch: int) -> Prompt:
    """The first scenes of the pocket world's test split, with its prompt for captions."""
    model, processor = loaded.model, loaded.processor
    inputs = processor(
        text=[rendered(processor, CAPTION_PROMPT)] * batch,
        images=[render(scene("test", number)) for number in range(batch)],
        return_tensors="pt",
    )
    return prompt_of(dict(inputs.to(model.device)), model)


def prompt_of(inputs: dict[str, Any], model: Any) -> Prompt:
    """A prompt of token ids without padding; its question is all text behind the image."""
    image = inputs["input_ids"] == model.config.image_token_id
    behind = image.flip(1).cumsum(1).flip(1) == 0
    return Prompt(inputs, image, behind)


@lru_cache(maxsize=1)
def llava_7b(device: torch.device, layers: int = 32) -> Loaded:
    """LLaVA-1.5-7B at full width in bfloat16 with random weights; the last one is kept."""
    return build(decoder(LLAVA_7B, layers, 32064), device, LLAVA_VISION, torch.bfloat16)


def pictured(loaded: Loaded, batch: int) -> Prompt:
    """Random pixels and random words around one image each."""
    model = loaded.model
    vision, size = model.config.vision_config, model.config.image_seq_length
    generator = torch.Generator().manual_seed(2)
    word = model.config.image_token_id
    ids = torch.randint(3, word, (batch, TEXT_BEFORE + size + TEXT_AFTER), generator=generator)
    ids[:, TEXT_BEFORE : TEXT_BEFORE + size] = word
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, generator=generator)
    inputs = {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
    return prompt_of(inputs, model)
