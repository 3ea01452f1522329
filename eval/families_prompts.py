"""A left-padded batch of two prompts with one image each, for a tiny model of any type.

Most models take image features as their tower would give them (`mm_encoder_outputs`), so that one
function serves them all and it is known what must land where. Models that take none are given
pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eval.families_sizes import BOS, IMAGE, PAD

Inputs: TypeAlias = dict[str, Any]
FORMS = ("tensor", "list", "deep", "layers")
"""Of image features: one tensor, one per image, the same with some for deeper layers, or with the
layers named. Which one a model takes is found out by trying."""

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
    image = model.config.video_token_id if kind == "instructblipvideo" else IMAGE
    ids = tokens(OTHER_SIZES.get(kind, IMAGE_TOKENS), image)
    found: Inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    draw = torch.Generator().manual_seed(seed)
    if kind in PIXELS:
        return found | PIXELS[kind](model, ids, draw)
    taken = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in taken:
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    if "token_type_ids" in taken:
        # PaliGemma marks its prompt with 0 and an answer with 1, others the image with 1
        found["token_type_ids"] = (ids == IMAGE).long() * (kind != "paligemma")
    if "image_grid_thw" in taken:
        found["image_grid_thw"] = torch.tensor([[1, 8, 8]] * 2)
    count, width = int((ids[0] == IMAGE).sum()), model.get_input_embeddings().weight.shape[1]
    features = _features(torch.randn(2, count, width, generator=draw), form)
    if kind == "ovis2":
        features["visual_indicator_features"] = torch.randn(2, width, generator=draw)
    return found | {"mm_encoder_outputs": {"image": features}}


def _features(drawn: Tensor, form: str) -> Any:
    """What a vision tower with its projector returns for features `[2, N, D]`."""
    output = BaseModelOutputWithPooling(last_hidden_state=drawn)
    output["pooler_output"] = drawn if form == "tensor" else list(drawn)
    output["router_logits"] = None
    if form == "deep":
        output["deepstack_features"] = [list(0.1 * drawn) for _ in range(3)]
    if form == "layers":
        output["deepstack_features"] = [(layer, list(drawn)) for layer in range(3)]
    return output


def _qformer(model: Any, ids: Tensor, draw: torch.Generator) -> Inputs:
    found = {"pixel_values": torch.randn(2, 3, 32, 32, generator=draw)}
    if "qformer_input_ids" in inspect.signature(model.generate).parameters:
        found["qformer_input_ids"] = torch.tensor([[5, 6, 7]] * 2)
    return found


def _qformer_video(model: Any, ids: Tensor, draw: torch.Generator) -> Inputs:
    frames = torch.randn(2, 4, 3, 32, 32, generator=draw)
    return _qformer(model, ids, draw) | {"pixel_values": frames}


def _kosmos2(model: Any, ids: Tensor, draw: torch.Generator) -> Inputs:
    side = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, side, side, generator=draw)
    return {"pixel_values": pixels, "image_embeds_position_mask": ids == IMAGE}


def _kosmos2_5(model: Any, ids: Tensor, draw: torch.Generator) -> Inputs:
    size = model.config.vision_config.patch_embed_hidden_size
    patches = torch.randn(2, 6, size + 2, generator=draw)
    patches[..., :2] = 0  # row and column
    return {"flattened_patches": patches, "image_embeds_position_mask": (ids == IMAGE).long()}


def _mllama(model: Any, ids: Tensor, draw: torch.Generator) -> Inputs:
    vision = model.config.vision_config
    tiles = vision.max_num_tiles
    pixels = (2, 1, tiles, 3, vision.image_size, vision.image_size)
    after = ((ids == IMAGE).cumsum(1) > 0).long()
    return {
        "pixel_values": torch.randn(pixels, generator=draw),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long),
        "cross_attention_mask": after.long()[..., None, None].expand(
            -1, -1, 1, vision.max_num_tiles
        ),
    }


def _phi4(model: Any, ids: Tensor, draw: torch.Generator) -> Inputs:
    """A whole image and one crop, 4 x 4 patches each."""
    return {
        "image_pixel_values": torch.randn(2, 2, 3, 56, 56, generator=draw),
        "image_sizes": torch.tensor([[56, 56]] * 2),
        "image_attention_mask": torch.ones(2, 2, 4, 4),
    }


PIXELS: Mapping[str, Callable[[Any, Tensor, torch.Generator], Inputs]] = {
    "blip-2": _qformer,
    "instructblip": _qformer,
    "instructblipvideo": _qformer_video,
    "kosmos-2": _kosmos2,
    "kosmos-2.5": _kosmos2_5,
    "mllama": _mllama,
    "phi4_multimodal": _phi4,
}
"""The inputs that carry pixels, of models that take no features."""
