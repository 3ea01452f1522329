"""Where a pocket model looks: attention sinks, massive activations and heads that see the picture.

Read from its own captions of a few test scenes, so that a card can say which premises of sink-based
and head-based methods hold for it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eval.pocket import CAPTION_PROMPT
from eval.pocket.build import IMAGE_TOKENS
from eval.pocket.measure import prompt, respond
from eval.pocket.scenes import render, scene

SINK_SHARE = 0.3
"""A key that draws this share of the attention of generated tokens is called a sink here."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer, means over scenes and generated tokens; shares lie in [0, 1]."""

    begin: float
    """Attention to the begin token."""
    image: float
    """Attention to all image tokens."""
    image_early: float
    image_late: float
    """The same in the first and the last quarter of a caption."""
    top_patch: float
    """Attention to the strongest image token, over the mean image token (1 to 64)."""
    spike_begin: float
    spike_image: float
    spike_text: float
    """Largest |channel| / RMS of the block's input: begin token, strongest image token, and median
    text token. At most sqrt(width); 2.7 is usual for noise of 128 channels."""
    heads: tuple[float, ...]
    """Per head: how far its output moves, relative to its length, without the image tokens."""


def _views_of(states: Tensor, weights: Tensor, values: Tensor, image: slice, start: int) -> Layer:
    """From block input [n, S, d], attention [n, heads, S, S] and values [n, heads, S, head dim]."""
    rows = weights[:, :, start:]
    seen = rows[..., image]
    quarter = max(1, rows.shape[2] // 4)
    spikes = states.abs().amax(-1) / states.pow(2).mean(-1).sqrt()
    patch = seen.mean((1, 2))
    blind = rows.clone()
    blind[..., image] = 0
    blind = blind / blind.sum(-1, keepdim=True).clamp_min(1e-9)
    full, without = rows @ values, blind @ values
    moved = (full - without).norm(dim=-1) / full.norm(dim=-1).clamp_min(1e-9)
    return Layer(
        begin=rows[..., 0].mean().item(),
        image=seen.sum(-1).mean().item(),
        image_early=seen[:, :, :quarter].sum(-1).mean().item(),
        image_late=seen[:, :, -quarter:].sum(-1).mean().item(),
        top_patch=(patch.amax(-1) / patch.mean(-1)).mean().item(),
        spike_begin=spikes[:, 0].mean().item(),
        spike_image=spikes[:, image].amax(-1).mean().item(),
        spike_text=spikes[:, start:].median().item(),
        heads=tuple(moved.mean((0, 2)).tolist()),
    )


@torch.no_grad()
def anatomy(model: Any, processor: Any, scenes: int = 32) -> list[Layer]:
    """One record per decoder layer. The model must have been loaded with eager attention."""
    images = [render(scene("test", index)) for index in range(scenes)]
    captions = respond(model, processor, images, [CAPTION_PROMPT] * scenes)
    tokens = min(len(processor.tokenizer(text).input_ids) for text in captions) - 1
    instruction = prompt(processor, CAPTION_PROMPT)
    inputs = processor(text=[instruction] * scenes, images=images, return_tensors="pt")
    start = inputs["input_ids"].shape[1] - 1
    caption_ids = [
        processor.tokenizer(f" {t}", add_special_tokens=False).input_ids[:tokens] for t in captions
    ]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor(caption_ids)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    values: list[Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, out: values.append(out))
        for layer in model.model.language_model.layers
    ]
    try:
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
    finally:
        for hook in hooks:
            hook.remove()
    count = model.config.text_config.num_attention_heads
    return [
        _views_of(
            states,
            weights,
            value.view(scenes, -1, count, value.shape[-1] // count).transpose(1, 2),
            slice(first, first + IMAGE_TOKENS),
            start,
        )
        for states, weights, value in zip(out.hidden_states, out.attentions, values, strict=False)
    ]


def rows(layers: list[Layer]) -> list[dict[str, Any]]:
    """The records as JSON, three digits."""
    return [
        {
            key: [round(v, 3) for v in value] if isinstance(value, tuple) else round(value, 3)
            for key, value in asdict(layer).items()
        }
        for layer in layers
    ]


def findings(layers: list[Layer], width: int) -> list[str]:
    """What exists and what does not, in sentences with the numbers that say so."""
    begin = max(layer.begin for layer in layers)
    patch = max(layer.top_patch for layer in layers)
    spike = max(layer.spike_image for layer in layers)
    usual, bound = max(layer.spike_text for layer in layers), width**0.5
    contrast = [max(layer.heads) / sorted(layer.heads)[len(layer.heads) // 2] for layer in layers]
    falls = sum(layer.image_late < layer.image_early for layer in layers)
    return [
        f"Attention sinks: {'yes' if begin >= SINK_SHARE else 'no'}. The begin token draws at most "
        f"{begin:.0%} of the attention in any layer; the strongest image token {patch:.1f} times "
        "the mean image token.",
        f"Massive activations: {'yes' if spike >= 0.7 * bound else 'no'}. The largest channel of "
        f"an image token is at most {spike:.1f} times its RMS (text tokens: {usual:.1f}; "
        f"possible: {bound:.1f}).",
        f"Heads that see the picture: {'yes' if max(contrast) >= 2 else 'no clear ones'}. Without "
        f"the image keys the output of a layer's strongest head moves {min(contrast):.1f} to "
        f"{max(contrast):.1f} times as far as that of its middle head.",
        f"Attention to the picture falls from the first to the last quarter of a caption in "
        f"{falls} of {len(layers)} layers.",
    ]
