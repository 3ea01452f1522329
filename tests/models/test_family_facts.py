"""Facts of single families that change meaning are really there in what `test_families.py`
compares: windows, masks that look ahead, shared keys, normed queries, capped scores, positions of
three axes.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch

from eval.support.build import CLASSES
from eval.support.reference import trace
from eval.support.reference.decoder import Run
from tests.support.family import (
    BREAKS_PADDING,
    KINDS,
    LEFT_OUT,
    STATEFUL,
    UNSUPPORTED,
    WITHOUT,
    family,
)

WINDOWS = (
    ("llava", (25, 25, 25), False, False),
    ("llava-mistral", (7, 7, 7), False, False),
    ("llava-gemma2", (7, 25, 7), False, False),
    ("aya_vision", (7, 25, 7), False, False),
    ("llama4", (15, 25, 15), False, False),
    ("gemma3", (7, 25, 7), True, False),
    ("gemma4_unified", (15, 25, 15), True, False),
    ("molmo2", (25, 25, 25), True, False),
    ("paligemma", (25, 25, 25), True, True),
    ("paligemma-2", (25, 25, 25), True, True),
)
"""How far a row of each layer looks back, and whether image and text look ahead."""


def test_every_type_is_either_compared_or_known_to_be_out() -> None:
    assert set(UNSUPPORTED) <= set(CLASSES)
    assert not {*BREAKS_PADDING, *WITHOUT, *STATEFUL} - set(KINDS)


@lru_cache(maxsize=1)
def stock_run(kind: str) -> Run:
    """The unpatched model on its first prompt of 26 tokens, 16 of them an image."""
    tiny = family(kind)
    sample = tiny.sample(0, torch.empty(0, dtype=torch.long))
    return trace(tiny.alone(0), sample).run


@pytest.mark.parametrize(
    ("kind", "reach", "image_ahead", "text_ahead"),
    [window for window in WINDOWS if window[0] not in LEFT_OUT],
)
def test_windows_and_masks(
    kind: str, reach: tuple[int, ...], image_ahead: bool, text_ahead: bool
) -> None:
    """By layer, how far back a token sees; whether image and text see what comes later."""
    image = torch.isin(family(kind).row(0), family(kind).image_ids)
    places = torch.arange(len(image))
    back = places[:, None] - places
    for weights, farthest in zip(stock_run(kind).stock_weights, reach, strict=True):
        seen = (weights > 0).any(0)
        assert int(back[seen].max()) == farthest
        ahead = seen & (back < 0)
        assert bool(ahead[image][:, image].any()) == image_ahead
        assert bool(ahead[~image].any()) == text_ahead


def test_values_of_another_size_than_keys() -> None:
    """Multi-head latent attention: 16 + 16 channels of query and key, 16 of value."""
    config = family("kimi_k25").model.config.get_text_config()
    assert (config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim) == (32, 16)
    assert stock_run("kimi_k25").outputs[0].shape == (4, 26, 16)


@pytest.mark.parametrize(
    ("kind", "groups"), [("paligemma", 1), ("qwen2_vl", 2), ("instructblip-opt", 4)]
)
def test_heads_that_share_keys(kind: str, groups: int) -> None:
    """Multi-query, grouped-query and plain multi-head attention."""
    config = family(kind).model.config.get_text_config()
    assert getattr(config, "num_key_value_heads", config.num_attention_heads) == groups
    assert config.num_attention_heads == 4


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl", "chameleon", "molmo2"])
def test_queries_and_keys_are_normed(kind: str) -> None:
    attention = dict(family(kind).model.get_decoder().named_modules())["layers.0.self_attn"]
    assert {"q_norm", "k_norm"} <= dict(attention.named_children()).keys()


@pytest.mark.parametrize("kind", ["paligemma-2", "llava-gemma2"])
def test_scores_are_capped(kind: str) -> None:
    config = family(kind).model.config.get_text_config()
    assert config.attn_logit_softcapping == 50.0
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "ernie4_5_vl_moe"])
def test_positions_of_three_axes(kind: str) -> None:
    """VHR's image-ablated forward re-packs m-rope, and so equals the model on text alone."""
    tiny, seen = family(kind), []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    handle = tiny.model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    tiny.generate()
    handle.remove()
    height, width = seen[0][-2:]
    assert seen[0].shape[0] in (3, 4)
    assert not torch.equal(height, width)
