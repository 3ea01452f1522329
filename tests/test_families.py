"""Every family against the literal reference: the methods alone and together, on a left-padded
batch, with new tokens from the cache.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers.utils import logging

import vlm_patch
from eval.families_build import CLASSES
from eval.families_check import Probe
from tests.compare import NO_PROCESSOR
from tests.family import STEPS, Family
from tests.reference import Gift, Method, Var, Vhr, trace
from vlm_patch import GIFT, VAR, VHR

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
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "paligemma-2": ("paligemma", {"text_config": {"model_type": "gemma2"}}),
    "llava-mistral": ("llava", {"text_config": {"model_type": "mistral"}}),
    "llava-gemma2": ("llava", {"text_config": {"model_type": "gemma2"}}),
    "instructblip-opt": ("instructblip", {"text_config": {"model_type": "opt"}}),
}
KINDS = [*(kind for kind in CLASSES if kind not in UNSUPPORTED), *VARIANTS]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """On one thread: for a model this small a second one costs more than it does."""
    threads, level = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.set_verbosity(logging.ERROR)
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(level)


@lru_cache(maxsize=1)
def family(kind: str) -> Family:
    name, changes = VARIANTS.get(kind, (kind, {}))
    return Family(name, **changes)


def softmax_layers(model: Any) -> list[int]:
    with vlm_patch.wrap(model, Probe()) as patch:
        words = patch.describe().splitlines()[0].rpartition(" in ")[2]
    runs = [part.partition("-") for part in words.split(", ")]
    return [n for a, dash, b in runs for n in range(int(a), int(b if dash else a) + 1)]


def pairs(layers: Sequence[int]) -> dict[str, tuple[Method, Any]]:
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


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind: str) -> None:
    tiny = family(kind)
    bound = LOOSE if kind in STATEFUL else CLOSE
    for label, names in SETS.items():
        if any(name.partition("-")[0] in WITHOUT.get(kind, ()) for name in names):
            continue
        assert apart(tiny, names, 0) <= bound, label
        assert (apart(tiny, names, 1) <= bound) != (kind in BREAKS_PADDING), label


def test_every_type_is_either_compared_or_known_to_be_out() -> None:
    assert set(UNSUPPORTED) <= set(CLASSES)
    assert not {*BREAKS_PADDING, *WITHOUT, *STATEFUL} - set(KINDS)
