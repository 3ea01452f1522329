"""VAR and GIFT against recorded generations of their official releases: token for token.

How they were recorded, and what the arrays are: docs/verification.md.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from eval.support.agreement import generated
from tests.support.agreement import generate
from vlm_patch import GIFT, VAR, wrap

PARITY = Path(__file__).parents[1] / "data" / "parity"
CASES = json.loads((PARITY / "cases.json").read_text())["cases"]
NEAR = 1e-4
# where the default words="content" is what the release's part-of-speech tagger says too
SAME_WORDS = ("s0", "s1", "s5")


@cache
def model(attn: str) -> LlavaForConditionalGeneration:
    found = LlavaForConditionalGeneration.from_pretrained(
        PARITY / "tiny-llava-mha", dtype=torch.float32, attn_implementation=attn
    )
    found.generation_config.eos_token_id = None  # it was off in the recordings
    return found.eval()


@cache
def recorded(key: str) -> Tensor:
    with np.load(PARITY / "recorded.npz") as arrays:
        return torch.from_numpy(arrays[key])


def prompt(case: dict[str, Any]) -> dict[str, Tensor]:
    ids = recorded(f"{case['key']}.input_ids").long()[None]
    pixels = recorded(f"pixels.{case['sample']}").float()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def method(case: dict[str, Any], length: int, **more: Any) -> GIFT | VAR:
    """The method with the values that the release ran with, for a prompt of `length` tokens."""
    if case["release"] == "GIFT":
        words = torch.zeros(1, length, dtype=torch.bool)
        words[:, case["content_positions"]] = True
        options = {"layers": case["layers"], "words": words} | more
        return GIFT(case["alpha"], saliency_layer=case["saliency_layers"], **options)
    names = ("move_fraction", "rho_nonsink", "min_image_mass", "tau", "dims", "semantics")
    return VAR(**{name: case[name] for name in names}, exclude_last_layer=False)


def named(*cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["key"])


def test_every_recording_is_held_against_the_library() -> None:
    kinds = [case["key"].rpartition(".")[0] for case in CASES]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "gift.shipped_style": 6,
        "gift.saliency_inside": 2,
        "gift.two_saliency_layers": 1,
        "var.shipped": 6,
        "var.paper_hallucination": 3,
    }


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@named(*CASES)
def test_a_generation_is_that_of_the_release(case: dict[str, Any], attn: str) -> None:
    inputs, key = prompt(case), case["key"]
    applied = method(case, inputs["input_ids"].shape[1])
    processor = AutoProcessor.from_pretrained(PARITY / "tiny-llava-mha")
    with wrap(model(attn), applied, processor=processor) as patch:
        if case["release"] == "VAR":
            assert patch.heads["var"].any(1).nonzero().flatten().tolist() == case["layers"]
        output = generate(model(attn), inputs, 7)
    assert generated(inputs, output)[0].tolist() == recorded(f"{key}.generated").tolist()
    apart = (torch.cat(output.logits) - recorded(f"{key}.logits")).abs().max()
    assert apart <= NEAR


@named(*CASES)
def test_a_recording_is_far_from_the_stock_model(case: dict[str, Any]) -> None:
    stock, key = model("eager")(**prompt(case)).logits[0, -1], case["key"]
    assert (recorded(f"{key}.logits")[0] - stock).abs().max() > 0.05
    if case["release"] == "GIFT":
        assert (recorded(f"{key}.stock_logits")[0] - stock).abs().max() <= NEAR


@named(*(c for c in CASES if c["release"] == "GIFT" and c["sample"] in SAME_WORDS))
def test_question_and_words_as_found_from_the_processor(case: dict[str, Any]) -> None:
    inputs = prompt(case)
    applied = method(case, inputs["input_ids"].shape[1], words="content")
    processor = AutoProcessor.from_pretrained(PARITY / "tiny-llava-mha")
    with wrap(model("sdpa"), applied, processor=processor):
        logits = model("sdpa")(**inputs).logits[0, -1]
    assert (logits - recorded(f"{case['key']}.logits")[0]).abs().max() <= NEAR
