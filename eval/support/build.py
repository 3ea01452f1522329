"""Tiny random models of every image-text-to-text type of transformers, from their configs alone."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from eval.support.sizes import ADJUSTED, MADE, PAD, SIZES, TOKENS

LAYERS = 3
SPREAD = 0.1
"""Standard deviation of the random weights; transformers' own leaves attention flat."""
CLASSES: dict[str, str] = {
    **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "phi4_multimodal": "Phi4MultimodalForCausalLM",
}
"""What AutoModelForImageTextToText knows, and one that transformers lists elsewhere."""


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of a type, ready to generate; nothing is downloaded.

    changes: arguments of its config class, such as another text_config.
    """
    make = getattr(transformers, CLASSES[kind])
    config = (make.config_class or CONFIG_MAPPING[kind])(**{**MADE.get(kind, {}), **changes})
    shrink(config)
    for path, value in ADJUSTED.get(kind, {}).items():
        _put(config, path, value)
    torch.manual_seed(seed)
    model = make(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, SPREAD)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def shrink(config: Any) -> None:
    """Makes a configuration and its parts small, in place; no size grows."""
    fields = vars(config)
    for name, size in SIZES.items():
        found = fields.get(name)
        if isinstance(found, int) and not isinstance(found, bool):
            setattr(config, name, min(size, found))
    for name, token in TOKENS.items():
        if hasattr(config, name):
            setattr(config, name, token)
    if isinstance(fields.get("num_hidden_layers"), int):
        _shrink_depth(config)
    for table in _ropes(config):
        table["mrope_section"] = [2, 3, 3]
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            shrink(getattr(config, name))


def _shrink_depth(config: Any) -> None:
    """A few layers, with at least one of every kind there is."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    depth = max(LAYERS, len(kinds))
    if kinds:
        config.layer_types = (kinds * depth)[:depth]
    config.num_hidden_layers = depth
    for name in ("mlp_layer_types", "layers_block_type", "indexer_types", "no_rope_layers"):
        found = getattr(config, name, None)
        if isinstance(found, list):
            setattr(config, name, (list(dict.fromkeys(found)) * depth)[:depth])
    if isinstance(getattr(config, "cross_attention_layers", None), list):
        config.cross_attention_layers = [1]


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The tables of rotary parameters; some models have one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        for table in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            if "rope_type" in table:
                yield table


def _put(config: Any, path: str, value: Any) -> None:
    *parts, last = path.split(".")
    for name in parts:
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    if isinstance(config, dict):
        config[last] = value
    else:
        setattr(config, last, value)
