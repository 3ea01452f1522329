"""A left-padded batch of two prompts with one image each, for a tiny model of any type.

Most models take image features as their tower would give them (`mm_encoder_outputs`), so that one
function serves them all and it is known what must land where. Models that take none are given
pixels.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eval.support.sizes import BOS, IMAGE, PAD

Inputs: TypeAlias = dict[str, Any]
FORMS = ("tensor", "list", "deep", "layers")
"""Of image features: one tensor, one per image, the same with some for deeper layers, or with the
layers named. Which one a model takes is found out by trying. Where features are given in the place
of pixels, the last two wrap them as transformers 5 does."""

TAKES_FEATURES = hasattr(GenerationMixin, "_supports_mm_encoder_outputs")
"""Whether this version of transformers takes image features. Where it does not, they are given in
the place of pixels, and the vision tower passes them on."""


def _wrapped(features: Any) -> BaseModelOutputWithPooling:
    output = BaseModelOutputWithPooling()
    output["pooler_output"] = features
    return output


PASSED_ON: Mapping[str, Callable[..., Any]] = {
    "tensor": lambda pixel_values, *_, **__: pixel_values,
    "list": lambda pixel_values, *_, **__: list(pixel_values),
    "deep": lambda pixel_values, *_, **__: _wrapped(pixel_values),
    "layers": lambda pixel_values, *_, **__: _wrapped(list(pixel_values)),
}
"""The tower that passes features on, by form; that of transformers 5 wraps what it returns."""

IMAGE_TOKENS = 16
OTHER_SIZES: Mapping[str, int] = {"hunyuan_vl": 20, "phi4_multimodal": 13, "mllama": 1}
"""Image tokens of models that count row ends too, or have only a marker."""
TEXTS = ([5, 6, 7], [11, 12, 13, 14, 15, 16]), ([8], [21, 22, 23, 24, 25, 26])
"""Text before and after the image."""


def tokens(count: int = IMAGE_TOKENS, image: int = IMAGE) -> Tensor:
    """Token ids `[2, S]`; the second prompt is shorter, and padded on the left."""
    rows = [[BOS, *before, *[image] * count, *after] for before, after in TEXTS]
    longest = max(map(len, rows))
    return torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])


def prompt(kind: str, model: Any, seed: int, form: str) -> Inputs:
    """Inputs of `generate`; everything in the images is drawn from `seed`."""
    ids = tokens(OTHER_SIZES.get(kind, IMAGE_TOKENS), image_id(kind, model))
    return around(kind, model, ids) | images(kind, model, seed, form)


def image_id(kind: str, model: Any) -> int:
    """The placeholder token."""
    return int(model.config.video_token_id) if kind == "instructblipvideo" else IMAGE


def around(kind: str, model: Any, ids: Tensor) -> Inputs:
    """What goes with token ids `[B, S]`, token by token."""
    image = ids == image_id(kind, model)
    found: Inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    taken = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in taken:
        found["mm_token_type_ids"] = image.int()
    if "token_type_ids" in taken:
        # PaliGemma marks its prompt with 0 and an answer with 1, others the image with 1
        found["token_type_ids"] = image.long() * (kind != "paligemma")
    if "image_embeds_position_mask" in taken:
        found["image_embeds_position_mask"] = image.long()
    if "cross_attention_mask" in taken:
        tiles = model.config.vision_config.max_num_tiles
        after = (image.cumsum(1) > 0).long()
        found["cross_attention_mask"] = after[..., None, None].expand(-1, -1, 1, tiles)
    return found


def images(kind: str, model: Any, seed: int, form: str) -> Inputs:
    """One image for each of two prompts: pixels, or features as a vision tower with its projector
    returns them.
    """
    draw = torch.Generator().manual_seed(seed)
    if kind in PIXELS:
        return PIXELS[kind](model, draw)
    count, width = OTHER_SIZES.get(kind, IMAGE_TOKENS), model.get_input_embeddings().weight.shape[1]
    drawn = torch.randn(2, count, width, generator=draw)
    grid = "image_grid_thw" in inspect.signature(model.forward).parameters
    found: Inputs = {"image_grid_thw": torch.tensor([[1, 8, 8]] * 2)} if grid else {}
    if not TAKES_FEATURES:
        tower = model.model if hasattr(model.model, "get_image_features") else model
        tower.get_image_features = PASSED_ON[form]
        return found | {"pixel_values": drawn}
    output = BaseModelOutputWithPooling(last_hidden_state=drawn)
    output["pooler_output"] = drawn if form == "tensor" else list(drawn)
    output["router_logits"] = None
    output["visual_indicator_features"] = torch.randn(2, width, generator=draw)
    if form == "deep":
        output["deepstack_features"] = [list(0.1 * drawn) for _ in range(3)]
    if form == "layers":
        output["deepstack_features"] = [(layer, list(drawn)) for layer in range(3)]
    return found | {"mm_encoder_outputs": {"image": output}}


def _pixels(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=draw)


def _qformer(model: Any, draw: torch.Generator, *frames: int) -> Inputs:
    found = {"pixel_values": _pixels(draw, *frames, 3, 32, 32)}
    if "qformer_input_ids" in inspect.signature(model.generate).parameters:
        found["qformer_input_ids"] = torch.tensor([[5, 6, 7]] * 2)
    return found


def _kosmos2(model: Any, draw: torch.Generator) -> Inputs:
    side = model.config.vision_config.image_size
    return {"pixel_values": _pixels(draw, 3, side, side)}


def _kosmos2_5(model: Any, draw: torch.Generator) -> Inputs:
    patches = _pixels(draw, 6, model.config.vision_config.patch_embed_hidden_size + 2)
    patches[..., :2] = 0  # row and column
    return {"flattened_patches": patches}


def _mllama(model: Any, draw: torch.Generator) -> Inputs:
    vision = model.config.vision_config
    tiles, side = vision.max_num_tiles, vision.image_size
    return {
        "pixel_values": _pixels(draw, 1, tiles, 3, side, side),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long),
    }


def _phi4(model: Any, draw: torch.Generator) -> Inputs:
    """A whole image and one crop, 4 x 4 patches each."""
    return {
        "image_pixel_values": _pixels(draw, 2, 3, 56, 56),
        "image_sizes": torch.tensor([[56, 56]] * 2),
        "image_attention_mask": torch.ones(2, 2, 4, 4),
    }


PIXELS: Mapping[str, Callable[[Any, torch.Generator], Inputs]] = {
    "blip-2": _qformer,
    "instructblip": _qformer,
    "instructblipvideo": lambda model, draw: _qformer(model, draw, 4),
    "kosmos-2": _kosmos2,
    "kosmos-2.5": _kosmos2_5,
    "mllama": _mllama,
    "phi4_multimodal": _phi4,
}
"""The inputs that carry pixels, of models that take no features."""
