"""What is known of a model: its decoder, the attention of every layer, its image tokens, its
published defaults.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from vlm_patch.errors import UnsupportedModelError
from vlm_patch.models.published import PROFILES
from vlm_patch.models.quirks import SPECIAL, Special

PIXELS = frozenset(("pixel_values", "flattened_patches"))


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its block, and the attention module in it."""

    index: int
    block: nn.Module
    attention: nn.Module


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a vision-language model.

    module: the decoder itself.
    kind: its model type.
    layers: those with softmax attention over the text's own tokens.
    depth, heads, width: number of layers, query heads of a layer, size of the residual stream.
    image_ids: placeholder token ids.
    profile: published defaults, by method.
    generator: the part whose `generate` makes the tokens.
    special: what is different about this model type.
    """

    module: nn.Module
    kind: str
    layers: tuple[Layer, ...]
    depth: int
    heads: int
    width: int
    image_ids: tuple[int, ...]
    profile: Mapping[str, Mapping[str, Any]]
    generator: Any
    special: Special

    @property
    def softmax(self) -> tuple[int, ...]:
        """The layers that can be patched, by number."""
        return tuple(layer.index for layer in self.layers)


def unwrapped(model: Any) -> list[Any]:
    """The models inside a model whose forward runs on the way, the innermost last.

    Sees through what `torch.compile` and DistributedDataParallel put around it, and through an
    adapter of PEFT. Raises UnsupportedModelError for what would run something else.
    """
    result: list[Any] = []
    while not result or result[-1] is not model:
        if isinstance(model, nn.DataParallel):
            raise UnsupportedModelError(
                "DataParallel runs copies of the model, made anew at every forward, on which no "
                "method is on: wrap the model inside it (model.module) and run it by itself, or "
                "one process per GPU with DistributedDataParallel"
            )
        if "_orig_mod" in getattr(model, "_modules", {}):  # what torch.compile returns
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            result.append(model)
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return result


def inspect_model(model: Any) -> Decoder:
    """What the library needs to know of a model. Raises UnsupportedModelError with the reason.

    inspect_model(model).depth
    """
    name = type(model).__name__
    if not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(
            f"{name} is no transformers model: expected a vision-language model such as "
            "AutoModelForImageTextToText.from_pretrained(...) gives"
        )
    special = SPECIAL.get(model.config.model_type, Special())
    image_ids = _image_ids(model.config, special)
    _check(model, name, special, image_ids)
    config = model.config.get_text_config()
    module = _decoder(model, special)
    cross = getattr(config, "cross_attention_layers", None) or ()
    layers = tuple(layer for layer in _layers(module) if layer.index not in cross)
    if not layers:
        raise UnsupportedModelError(
            f"the attention of {name} cannot be reached: no layer of {type(module).__name__} goes "
            "through transformers' attention interface (remote code, an old implementation, or "
            "sparse attention that picks its keys by an index)"
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
        generator=getattr(model, special.generator) if special.generator else model,
        special=special,
    )


def _check(model: Any, name: str, special: Special, image_ids: tuple[int, ...]) -> None:
    """Raises UnsupportedModelError for models on which no method is right."""
    if special.unsupported:
        raise UnsupportedModelError(f"{name} is not supported: {special.unsupported}")
    pictured = not PIXELS.isdisjoint(inspect.signature(type(model).forward).parameters)
    if pictured and _encodes(model.config):
        raise UnsupportedModelError(
            f"{name} looks at the image through cross-attention; this version edits decoders that "
            "hold the image among their own tokens"
        )
    if not image_ids and not special.mask:
        raise UnsupportedModelError(
            f"{name} is no vision-language model: its config names no image_token_id. "
            "Load it with AutoModelForImageTextToText."
        )
    if not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(
            f"{name} cannot generate, so it is only a part of a model: wrap the whole one, such as "
            "AutoModelForImageTextToText.from_pretrained(...) gives"
        )


def _encodes(config: Any) -> bool:
    """Whether a model has an encoder that its decoder looks at through cross-attention."""
    return any(part.is_encoder_decoder for part in (config, config.get_text_config()))


def _image_ids(config: Any, special: Special) -> tuple[int, ...]:
    result: list[Any] = []
    for path in ("image_token_id", "video_token_id", *special.ids):
        token = functools.reduce(
            lambda part, name: getattr(part, name, None), path.split("."), config
        )
        result += token if isinstance(token, list | tuple) else [token]
    return tuple(dict.fromkeys(token for token in result if isinstance(token, int)))


def _decoder(model: Any, special: Special) -> nn.Module:
    """The innermost text decoder: a language model around it would hide its layers' own output."""
    if special.decoder:
        module: nn.Module = operator.attrgetter(special.decoder)(model)
        return module
    outer, inner = None, model.get_decoder()
    while inner is not outer and hasattr(inner, "get_decoder"):
        outer, inner = inner, inner.get_decoder()
    return _innermost(inner)


def _innermost(decoder: nn.Module) -> nn.Module:
    """The innermost model that holds the attention of every layer: `get_decoder()` of transformers
    before 5 may stop at one around it, which has the vision tower too.
    """
    every = set(filter(_dispatches, decoder.modules()))
    models = [module for module in decoder.modules() if isinstance(module, PreTrainedModel)]
    return [decoder, *(model for model in models if every <= set(model.modules()))][-1]


def _layers(decoder: nn.Module) -> list[Layer]:
    modules: dict[str, Any] = dict(decoder.named_modules())
    result = []
    for name, module in modules.items():
        if _dispatches(module):
            block = _block(name, modules)
            result.append(Layer(module.layer_idx, block, module))
    return sorted(result, key=lambda layer: layer.index)


def _dispatches(module: nn.Module) -> bool:
    """Whether this is a decoder attention that asks transformers for its attention function, and
    for nothing else.

    Attention that picks its keys by an index (DeepSeek's sparse attention) looks at the function's
    name too, and computes something else under another one.
    """
    if hasattr(module, "skip_topk") or getattr(module, "indexer", None) is not None:
        return False
    return hasattr(module, "layer_idx") and asks_for_attention(module)


def asks_for_attention(module: nn.Module) -> bool:
    """Whether a module, of a decoder or of a vision tower, gets its attention function from
    transformers.
    """
    if not hasattr(module, "config"):
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


def place(module: nn.Module) -> str:
    """The types and devices of a module's weights, in words: "bfloat16 on cuda:0, cuda:1"."""
    weights = list(module.parameters())
    dtypes = dict.fromkeys(str(weight.dtype).removeprefix("torch.") for weight in weights)
    devices = dict.fromkeys(str(weight.device) for weight in weights)
    return f"{', '.join(dtypes)} on {', '.join(devices)}"
