"""The inputs of a model with other pixels, of the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_patch.errors import PatchError
from vlm_patch.method import Branch, ForwardContext, Phase
from vlm_patch.models.info import Decoder

GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""By input, what says how many patches each image has, of models that take patches in one row."""


def with_pixels(
    name: str,
    branch: Branch,
    inputs: Mapping[str, Any],
    asked: Mapping[str, Any],
    forward: ForwardContext,
    decoder: Decoder,
) -> dict[str, Any]:
    """The whole model's inputs for a stream that sees other pixels.

    asked: the arguments of `generate`, which encodes images before it calls the model. Raises
    PatchError where the pixels are not at hand.
    """
    assert branch.pixels is not None
    if forward.position.phase is not Phase.PREFILL:
        raise PatchError(
            f"{name} shows the model other pixels, which it must do with the whole prompt: found "
            "one that is read in parts. Leave out prefill_chunk_size, or read the prompt at once."
        )
    here = changed(inputs, branch.pixels)
    if here:
        return {**inputs, **here}
    there = changed(asked, branch.pixels)
    if not there:
        raise PatchError(
            f"{name} shows the model other pixels, but the images of this prompt were encoded "
            "before. Call the model or generate with pixel_values instead of image features."
        )
    generator: Any = decoder.generator
    told = {key: value for key, value in asked.items() if key != "mm_encoder_outputs"}
    encoded = generator._prepare_multimodal_encoder_kwargs_for_generation({**told, **there})
    features, ids = encoded["mm_encoder_outputs"], asked.get("input_ids", asked.get("inputs"))
    times = 1 if ids is None else len(forward.valid) // len(ids)
    if times > 1:  # beams and return sequences
        features = generator._expand_multimodal_outputs(ids, features, expand_size=times)
    return {**inputs, "mm_encoder_outputs": features}


def changed(inputs: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The inputs that hold pixels, changed image by image."""
    found: dict[str, Any] = {}
    for key, value in inputs.items():
        if "pixel_values" in key and value is not None:
            grid = inputs.get(GRIDS.get(key, ""))
            if isinstance(value, Tensor) and grid is not None:
                sizes = grid.prod(-1).tolist()
                found[key] = torch.cat([change(image) for image in torch.split(value, sizes)])
            else:
                images = [change(image) for image in value]
                found[key] = torch.stack(images) if isinstance(value, Tensor) else images
    return found
