"""Model types that need to be told apart: one line of data for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Special:
    """What a model type does differently from the common rule: the placeholders are the config's
    image_token_id and video_token_id, the decoder is that of `get_decoder()`, and `generate` is the
    model's own.

    ids: where its config names visual tokens, beside image_token_id and video_token_id.
    mask: the input that says which tokens are image, in the place of token ids.
    generator: the part whose `generate` the model's own calls, with embeddings.
    decoder: the text decoder, where `get_decoder` gives something around it.
    positions_from_padding: the decoder counts its positions itself, by the padding tokens.
    has_chat_template: without one, a prompt is the image and the question behind it.
    refused: methods that would be wrong, by name, and why.
    unsupported: why no method can be right.
    """

    ids: tuple[str, ...] = ()
    mask: str | None = None
    generator: str | None = None
    decoder: str | None = None
    positions_from_padding: bool = False
    has_chat_template: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    unsupported: str | None = None


_ALONE = "its cross-attention holds image keys alone"
SPECIAL: Mapping[str, Special] = {
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo"),
        Special(generator="language_model", has_chat_template=False),
    ),
    "kosmos-2": Special(
        mask="image_embeds_position_mask",
        generator="text_model",
        decoder="text_model.model",
        positions_from_padding=True,
        has_chat_template=False,
    ),
    "kosmos-2.5": Special(
        mask="image_embeds_position_mask",
        decoder="text_model.model",
        positions_from_padding=True,
        has_chat_template=False,
    ),
    "paligemma": Special(has_chat_template=False),
    "phi4_multimodal": Special(ids=("vision_config.image_token_id",)),
    # its separators inside an image come from the vision side, as LLaVA-NeXT's newlines do
    "ovis2": Special(ids=("visual_indicator_token_ids",)),
    "mllama": Special(
        refused={
            "var": f"{_ALONE}, which have no residual stream to find sinks in",
            "gift": f"{_ALONE}, so no question could keep pace with them",
        }
    ),
    "muse_spark": Special(
        refused={"vhr": "it normalises each head's output, so that no gain reaches what follows"}
    ),
    "idefics": Special(
        unsupported=f"{_ALONE}, and its config does not name the tokens that stand for images"
    ),
    "blip": Special(unsupported="its attention does not go through transformers' interface"),
    "git": Special(unsupported="its attention does not go through transformers' interface"),
}
"""By model type."""
