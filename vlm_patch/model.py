"""What is known of a model: its decoder, the attention of every layer, its image tokens, its
published defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vlm_patch.errors import UnsupportedModelError


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its block, and the attention module in it."""

    index: int
    block: nn.Module
    attention: nn.Module


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a vision-language model.

    kind: its model type. heads: query heads. image_ids: placeholder token ids.
    """

    module: nn.Module
    kind: str
    layers: tuple[Layer, ...]
    depth: int
    heads: int
    width: int
    image_ids: tuple[int, ...]
    profile: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Profile:
    """Published defaults of the methods for one decoder; `vlm` narrows it to one kind of model."""

    decoder: str
    depth: int
    width: int
    key_value_heads: int
    defaults: Mapping[str, Mapping[str, Any]]
    vlm: str | None = None


# Sources: VAR's D_sink table (arXiv 2503.03321), GIFT's release settings (arXiv 2510.22067), VHR's
# section 4.1 (arXiv 2412.13949), and massive activations of Mistral and LLaMA-3 (arXiv 2402.17762).
# InstructBLIP stands on an older Vicuna, made of LLaMA-1: v1.5's channels are not claimed for it.
PROFILES = (
    Profile("llama", 32, 4096, 32, {"vhr": {"layers": tuple(range(14, 32))}}, "instructblip"),
    Profile(
        "llama",
        32,
        4096,
        32,
        {
            "var": {"dims": (1415, 2533)},
            "gift": {"alpha": 5.0, "saliency_layer": 11, "layers": tuple(range(12, 23))},
            "vhr": {"layers": (1, *range(18, 32))},
        },
    ),
    Profile(
        "llama",
        40,
        5120,
        40,
        {
            "var": {"dims": (2100, 4743)},
            "gift": {"alpha": 5.0, "saliency_layer": 10, "layers": tuple(range(14, 21))},
        },
    ),
    Profile("llama", 32, 4096, 8, {"var": {"dims": (788, 1384, 4062)}}),
    Profile("mistral", 32, 4096, 8, {"var": {"dims": (2070,)}}),
    Profile(
        "qwen2_vl_text",
        28,
        3584,
        4,
        {
            "var": {"dims": (458, 2570)},
            "gift": {"alpha": 4.0, "saliency_layer": 14, "layers": tuple(range(5, 19))},
        },
    ),
)


def read(model: Any) -> Decoder:
    """What the library needs to know of a model. Raises UnsupportedModelError with the reason."""
    name = type(model).__name__
    if not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(
            f"{name} is no transformers model: expected a vision-language model such as "
            "AutoModelForImageTextToText.from_pretrained(...) gives"
        )
    image_ids = _image_ids(model.config)
    if not image_ids:
        raise UnsupportedModelError(
            f"{name} is no vision-language model: its config names no image_token_id. "
            "Load it with AutoModelForImageTextToText."
        )
    if not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(
            f"{name} cannot generate, so it is only a part of a model: wrap the whole one, such as "
            "AutoModelForImageTextToText.from_pretrained(...) gives"
        )
    if hasattr(model, "qformer"):
        raise UnsupportedModelError(
            f"{name} runs its language model through a generate of its own, which hides the image "
            "tokens; it is not supported by this version"
        )
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or getattr(config, "cross_attention_layers", None):
        raise UnsupportedModelError(
            f"{name} looks at the image through cross-attention; this version edits decoders that "
            "hold the image among their own tokens"
        )
    module = _innermost(model.get_decoder())
    layers = tuple(_layers(module))
    if not layers:
        raise UnsupportedModelError(
            f"the attention of {name} cannot be reached: no layer of {type(module).__name__} goes "
            "through transformers' attention interface (remote code, or an old implementation)"
        )
    return Decoder(
        module=module,
        kind=config.model_type,
        layers=layers,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        width=config.hidden_size,
        image_ids=image_ids,
        profile=_profile(config, model.config.model_type),
    )


def _image_ids(config: Any) -> tuple[int, ...]:
    found = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(token for token in found if isinstance(token, int))


def _innermost(decoder: nn.Module) -> nn.Module:
    """The innermost model that holds the attention of every layer: `get_decoder()` of transformers
    before 5 may stop at one around it, which has the vision tower too.
    """
    every = set(filter(_dispatches, decoder.modules()))
    models = [module for module in decoder.modules() if isinstance(module, PreTrainedModel)]
    return [decoder, *(model for model in models if every <= set(model.modules()))][-1]


def _layers(decoder: nn.Module) -> list[Layer]:
    modules: dict[str, Any] = dict(decoder.named_modules())
    found = []
    for name, module in modules.items():
        if _dispatches(module):
            block = _block(name, modules)
            found.append(Layer(module.layer_idx, block, module))
    return sorted(found, key=lambda layer: layer.index)


def _dispatches(module: nn.Module) -> bool:
    """Whether this is a decoder attention that asks transformers for its attention function."""
    if not all(hasattr(module, name) for name in ("layer_idx", "config")):
        return False
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", forward).co_names


def _block(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The element of the list of layers that holds the attention called `name`."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(modules[".".join(parts[: end - 1])], nn.ModuleList):
            return modules[".".join(parts[:end])]
    raise UnsupportedModelError(f"attention {name!r} does not stand in a list of layers")


def _profile(config: Any, vlm: str) -> Mapping[str, Mapping[str, Any]]:
    key = (
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    )
    for row in PROFILES:
        if (row.decoder, row.depth, row.width, row.key_value_heads) == key and row.vlm in (
            None,
            vlm,
        ):
            return row.defaults
    return {}
