"""Attention sinks planted in tiny models of several families: BOS and one image token of a hundred.

The sinks have massive activations in two channels. Their keys point where every query looks, since
all other tokens share one channel; their values are next to nothing.
"""

from typing import Any

import torch
from torch import nn

from eval.support.build import SPREAD, build
from eval.support.prompts import Inputs, around, images
from eval.support.sizes import BOS, IMAGE

SINKS = [3, 10]
SHARED = 20
SIZE, PLACE, TOKENS = 40.0, 40, 100
SLOW = [7, 15]
"""The rotary pair of a head of 16 channels that turns least with distance."""


def planted(kind: str) -> tuple[Any, Inputs]:
    """A model with sinks and a prompt for it, of two images."""
    model = _deeper(build(kind)) if kind == "qwen3_5" else build(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.normal_(0, 1, generator=generator)
        _mark(embeddings, slice(BOS, BOS + 1))
        for block in model.get_decoder().layers:
            _plant(block)
    texts = [31, 32, 33, 34, 35, 36], [41, 42, 43, 44, 45, 46]
    ids = torch.tensor([[BOS, 5, 6, *[IMAGE] * TOKENS, *text] for text in texts])
    features = torch.randn(2, TOKENS, embeddings.shape[1], generator=generator)
    _mark(features.view(-1, embeddings.shape[1]), slice(PLACE, None, TOKENS))
    inputs = around(kind, model, ids) | images(kind, model, 0, "list")
    inputs["mm_encoder_outputs"]["image"]["pooler_output"] = list(features)
    if "image_grid_thw" in inputs:
        inputs["image_grid_thw"] = torch.tensor([[1, 20, 20]] * 2)
    return model, inputs


def _deeper(model: Any) -> Any:
    """A hybrid decoder with four layers of softmax attention instead of one."""
    text = model.config.text_config
    text.layer_types, text.num_hidden_layers = ["linear_attention", "full_attention"] * 4, 8
    deeper = type(model)(model.config).eval()
    for weight in deeper.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, 0, SPREAD, generator=torch.Generator().manual_seed(3))
    deeper.generation_config = model.generation_config
    return deeper


def _mark(rows: torch.Tensor, sinks: slice) -> None:
    """In rows [N, D], the shared channel everywhere, and massive activations in the sinks alone."""
    rows[:, SINKS], rows[:, SHARED] = 0.0, 4.0
    rows[sinks] *= 0.01
    rows[sinks, SINKS[0]], rows[sinks, SINKS[1]] = SIZE, -SIZE


def _plant(block: nn.Module) -> None:
    if hasattr(block, "linear_attn"):
        _hush(block.linear_attn.out_proj.weight, block.mlp.down_proj.weight)
        return
    attention = block.self_attn
    slow = torch.zeros(16)
    slow[SLOW] = 1.0
    query, key, value = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    query *= 0.3
    key *= 0.3
    query[:, SHARED] = 0.3 * slow.repeat(len(query) // 16)
    key[:, SINKS[0]] = 0.6 * slow.repeat(len(key) // 16)
    key[:, SINKS[1]] = -key[:, SINKS[0]]
    value[:, SINKS] = 0.0
    _hush(attention.o_proj.weight, block.mlp.down_proj.weight)


def _hush(*writers: torch.Tensor) -> None:
    """Lets what writes into the stream leave the sinks as they are."""
    for writer in writers:
        writer *= 0.05
        writer[[*SINKS, SHARED]] = 0.0
