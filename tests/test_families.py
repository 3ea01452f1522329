"""Every family against the literal reference: the methods alone and together, on a left-padded
batch, with new tokens from the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlm_patch
from eval.families import quietly
from eval.families_build import CLASSES
from eval.families_check import Probe
from tests import reference
from tests.compare import NO_PROCESSOR
from tests.family import STEPS, Family
from tests.reference import Gift, Var, Vhr, trace
from tests.reference.decoder import Run
from tests.untouched import check_untouched
from vlm_patch import GIFT, VAR, VHR
from vlm_patch.method import Forward, Memory, Method
from vlm_patch.methods import sinks

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:no published settings")
CLOSE = 1e-5
LOOSE = 3e-5
"""For state spaces and linear attention, which in float32 make a padded batch differ that much by
themselves."""
STATEFUL = ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni", "qwen3_5")
BREAKS_PADDING = ("hunyuan_vl", "kosmos-2", "kosmos-2.5")
"""The unpatched model answers a padded prompt otherwise than the same prompt alone."""
WITHOUT = {"mllama": ("var", "gift"), "muse_spark": ("vhr",)}
UNSUPPORTED = (
    *("blip", "git", "idefics", "evolla", "mistral4", "pi0", "diffusion_gemma", "dots3_note"),
    *("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"),
    *("glm5_next", "mistral_large4", "qwen4_exp", "gemma3n", "inkling_mm_model", "inkling2"),
)
NEWER = ("inkling2_loop", "hy_v4_vl")
"""Unsupported too, and known to transformers since 5.24."""
BROKEN = {"5.24.0": ("llama4",)}
"""Types whose stock model does not run in a version of transformers, by version."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "paligemma-2": ("paligemma", {"text_config": {"model_type": "gemma2"}}),
    "llava-mistral": ("llava", {"text_config": {"model_type": "mistral"}}),
    "llava-gemma2": ("llava", {"text_config": {"model_type": "gemma2"}}),
    "instructblip-opt": ("instructblip", {"text_config": {"model_type": "opt"}}),
}
LEFT_OUT = (*UNSUPPORTED, *NEWER, *BROKEN.get(transformers.__version__, ()))
KINDS = [*(kind for kind in CLASSES if kind not in LEFT_OUT), *VARIANTS]
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


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quietly():
        yield


def made(kind: str) -> Family:
    name, changes = VARIANTS.get(kind, (kind, {}))
    with quietly():
        return Family(name, **changes)


@pytest.fixture(scope="module", params=KINDS)
def named(request: pytest.FixtureRequest) -> tuple[str, Family]:
    """Every type in turn; tests of one type run together, so that each model is built once."""
    return request.param, made(request.param)


family = lru_cache(maxsize=4)(made)


def softmax_layers(model: Any) -> list[int]:
    with vlm_patch.wrap(model, Probe()) as patch:
        words = patch.describe().splitlines()[0].rpartition(" in ")[2]
    runs = [part.partition("-") for part in words.split(", ")]
    return [n for a, dash, b in runs for n in range(int(a), int(b if dash else a) + 1)]


def pairs(layers: Sequence[int]) -> dict[str, tuple[reference.Method, Any]]:
    """Each method for the reference and for the library; tau makes sinks of ordinary tokens."""
    first, last, all_of_them = layers[0], layers[-1], tuple(layers)
    return {
        "var": (
            Var((3,), 1.0, rho_nonsink=0.0, min_image_mass=0.0, exclude_last_layer=False),
            VAR(
                dims=(3,),
                tau=1.0,
                rho_nonsink=0.0,
                min_image_mass=0.0,
                exclude_last_layer=False,
            ),
        ),
        "gift": (Gift(3.0, first, (last,)), GIFT(3.0, saliency_layer=first, layers=(last,))),
        "gift-late": (Gift(2.0, last, (first,)), GIFT(2.0, saliency_layer=last, layers=(first,))),
        "vhr": (Vhr(all_of_them), VHR(layers=all_of_them)),
    }


SETS = {
    "stock": (),
    "var": ("var",),
    "gift-late": ("gift-late",),
    "vhr": ("vhr",),
    "together": ("var", "gift", "vhr"),
}


def apart(tiny: Family, names: Sequence[str], index: int) -> float:
    """How far a generation of the library is from the reference, in one of the two prompts."""
    both = pairs(softmax_layers(tiny.model))
    ours = [both[name][1] for name in names] or [Probe()]
    with vlm_patch.wrap(tiny.model, *ours):
        logits, new = tiny.generate()
    seen = trace(tiny.alone(index), tiny.sample(index, new[index]), [both[n][0] for n in names])
    expected = seen.run.logits[-STEPS - 1 : -1]
    return float((expected - logits[index].double()).abs().max())


def test_against_the_reference(named: tuple[str, Family]) -> None:
    kind, tiny = named
    bound = LOOSE if kind in STATEFUL else CLOSE
    for label, names in SETS.items():
        if any(name.partition("-")[0] in WITHOUT.get(kind, ()) for name in names):
            continue
        assert apart(tiny, names, 0) <= bound, label
        assert (apart(tiny, names, 1) <= bound) != (kind in BREAKS_PADDING), label


def test_nothing_is_left_behind(named: tuple[str, Family], tmp_path: Path) -> None:
    kind, tiny = named
    both = pairs(softmax_layers(tiny.model))
    names = [name for name in ("var", "gift", "vhr") if name not in WITHOUT.get(kind, ())]
    methods = [both[name][1] for name in names]
    check_untouched(tiny.model, lambda: tiny.generate()[0], methods, tmp_path)


def test_every_type_is_either_compared_or_known_to_be_out() -> None:
    assert set(UNSUPPORTED) <= set(CLASSES)
    assert not {*BREAKS_PADDING, *WITHOUT, *STATEFUL} - set(KINDS)


# ---- what VAR is shown


@dataclass(frozen=True, eq=False)
class Streams(Method):
    """Keeps what enters every block while a prompt is read."""

    name: ClassVar[str] = "streams"
    reads_blocks: ClassVar[bool] = True
    seen: dict[int, Tensor] = field(default_factory=dict)

    def block_input(self, layer: int, hidden: Tensor, forward: Forward, memory: Memory) -> None:
        self.seen.setdefault(layer, hidden.clone())


DEEPSTACK = (
    *("cohere_compass", "cosmos3_omni", "granite4_vision", "granite_docling", "qwen3_vl"),
    *("qwen3_vl_moe", "qwen3_omni_moe_thinker"),
)
"""Image features are added to the stream between their first layers, behind what transformers
reports as hidden states."""


def test_the_raw_stream_that_enters_a_block(named: tuple[str, Family]) -> None:
    """Before any norm, as the sink score wants it: the hidden states that transformers reports."""
    (kind, tiny), streams = named, Streams()
    if kind == "phi4_multimodal":  # its vision tower fails when hidden states are asked for
        return
    with vlm_patch.wrap(tiny.model, streams):
        output = tiny.model.generate(
            **tiny.prompt(),
            max_new_tokens=1,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    assert list(streams.seen) == softmax_layers(tiny.model)
    text = ~torch.isin(tiny.batch["input_ids"], tiny.image_ids)
    for layer, hidden in streams.seen.items():
        expected = output.hidden_states[0][layer]
        if kind in DEEPSTACK:
            assert torch.equal(hidden, expected) == (layer == 0)
            hidden, expected = hidden[text], expected[text]
            if layer > 1:  # text has seen other image keys from here on
                continue
        assert torch.equal(hidden, expected), layer


def test_a_model_without_massive_activations_is_reported(named: tuple[str, Family]) -> None:
    kind, tiny = named
    if "var" in WITHOUT.get(kind, ()):
        return
    before, _ = tiny.generate()
    with (
        vlm_patch.wrap(tiny.model, VAR()),
        pytest.warns(UserWarning, match="VAR does nothing on this model: no attention sink"),
    ):
        after, _ = tiny.generate()
    assert torch.equal(before, after)


OUTPUT = ("o_proj", "out_proj", "dense")


def carried(attention: nn.Module, values: Tensor, weights: Tensor) -> Tensor:
    """Mean over heads of the mean weight of a key times |v W_O| `[S]`, step by step.

    values `[H, S, d]`, weights `[H, R, S]`.
    """
    matrix = next(module for name, module in attention.named_children() if name in OUTPUT).weight
    total = torch.zeros(values.shape[1], dtype=values.dtype)
    for head, own in enumerate(values):
        columns = matrix[:, head * own.shape[1] : (head + 1) * own.shape[1]].double()
        total += weights[head].mean(0) * (own @ columns.T).norm(dim=-1)
    return total / len(values)


def test_what_sinks_are_looked_for_in(
    named: tuple[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams, attention of the text behind the image, and what keys carry, for GQA, MQA, MLA and
    hybrid decoders alike.
    """
    kind, tiny = named
    if "var" in WITHOUT.get(kind, ()):
        return
    calls: list[tuple[Tensor, ...]] = []

    def catch(*args: Tensor) -> sinks.Found:
        calls.append(args)
        return sinks.Found((3,))

    monkeypatch.setattr(sinks, "judge", catch)
    with vlm_patch.wrap(tiny.model, VAR()) as patch:
        _, new = tiny.generate()
        assert "dims=(3,)" in patch.describe()
    blocks, attention, values, valid, image = calls[0]
    near: dict[str, Any] = {"rtol": CLOSE, "atol": CLOSE}
    modules = {module.layer_idx: module for module in tiny.alone(0).blocks}
    for index in () if kind in BREAKS_PADDING else (0, 1):
        sample, alone = tiny.sample(index, new[index][:0]), tiny.alone(index)
        run, kept = trace(alone, sample).run, valid[index]
        assert torch.equal(image[index][kept], sample.image)
        for place, layer in enumerate(softmax_layers(tiny.model)):
            weights = run.stock_weights[layer][:, sample.turns[0].query]
            found = (blocks[index, place], attention[index, place], values[index, place])
            expected = (
                run.block_inputs[layer],
                weights.mean((0, 1)),
                carried(modules[layer], alone.values[layer], weights),
            )
            for seen, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(seen[kept].double(), wanted, **near)


# ---- facts that change meaning are really there in what is compared above


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
    """So that the text-only pass of VHR, which equals the model on text alone, re-packs m-rope."""
    tiny, seen = family(kind), []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    handle = tiny.model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    tiny.generate()
    handle.remove()
    height, width = seen[0][-2:]
    assert seen[0].shape[0] in (3, 4)
    assert not torch.equal(height, width)
