"""PAINT against recordings of its release (hasanar1f/PAINT, Apache-2.0) on a tiny LLaVA.

The release has a contrast on top, which this library does not have; its image stream is held
against ours with the tokens that came out there (see tests/data/parity/paint/*/meta.json).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.support.agreement import NO_PROCESSOR
from vlm_patch import PAINT, wrap
from vlm_patch.method import ForwardContext, State
from vlm_patch.methods.paint import LOCAL, SUMMARY, outliers, top

PARITY = Path(__file__).parents[1] / "data" / "parity"
SETTINGS = {
    folder.name: json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for folder in sorted((PARITY / "paint").iterdir())
}
RUNS = [(name, sample["name"]) for name, meta in SETTINGS.items() for sample in meta["samples"]]
pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


@cache
def model_of(attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    folder = PARITY / "tiny-llava-mha"
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation=attn)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def arrays(path: str) -> dict[str, Tensor]:
    with np.load(PARITY / f"{path}.npz") as found:
        return {name: torch.from_numpy(found[name]) for name in found.files}


def inputs(sample: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    given = arrays(f"inputs/{sample}")
    ids = given["input_ids"].long()[None]
    pixels = given["pixel_values"].to(dtype)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def method(setting: str) -> PAINT:
    meta = SETTINGS[setting]
    layers = range(meta["start_layer"], meta["end_layer"])
    semantics = "release" if meta["edited_passes"] == "decode steps only" else "paper"
    return PAINT(meta["alpha"], meta["beta"], meta["rho"], layers, semantics)


def test_presets_are_among_the_recordings() -> None:
    """As its scripts run, and the same with its prompt edited."""
    release = PAINT.release()
    found = method("guided_release")
    assert (found.alpha, found.beta, found.rho) == (release.alpha, release.beta, release.rho)
    assert found.semantics == release.semantics
    assert method("attention_release").semantics == "paper"


@pytest.mark.parametrize(("setting", "sample"), RUNS)
def test_logits_with_the_tokens_of_the_release(setting: str, sample: str) -> None:
    recorded = arrays(f"paint/{setting}/{sample}")
    model = model_of("eager")
    with wrap(model, method(setting)), torch.no_grad():
        output = model(**inputs(sample), output_attentions=True)
        rows, found = [output.attentions], [output.logits[0, -1]]
        for token in recorded["generated"][:-1].long():
            cache = {"past_key_values": output.past_key_values}
            output = model(input_ids=token.view(1, 1), **cache, output_attentions=True)
            rows.append(output.attentions)
            found.append(output.logits[0, -1])
    torch.testing.assert_close(torch.stack(found), recorded["logits"].float(), rtol=0, atol=1e-4)
    if setting == "guided_release":  # row 0 is the stock model's, bit for bit
        stock = model(**inputs(sample)).logits[0, -1]
        assert torch.equal(found[0], stock)
    for step, layers in enumerate(rows if "attention_rows" in recorded else []):
        shown = torch.stack([layer[0, :, -1] for layer in layers])
        expected = recorded["attention_rows"][step, ..., : shown.shape[-1]].float()
        torch.testing.assert_close(shown, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "sample"), [run for run in RUNS if not SETTINGS[run[0]]["contrast"]]
)
def test_free_generation(setting: str, sample: str) -> None:
    recorded = arrays(f"paint/{setting}/{sample}")["generated"].long()
    model, given = model_of(), inputs(sample)
    with wrap(model, method(setting)):
        output = model.generate(**given, do_sample=False, max_new_tokens=len(recorded))
    assert torch.equal(output[0, given["input_ids"].shape[1] :], recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("setting", "sample"), RUNS)
def test_sets(
    setting: str, sample: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the rows of the tower that they are made of."""
    seen: list[ForwardContext] = []
    before = PAINT.before_forward

    def keep(self: PAINT, forward: ForwardContext, state: State) -> None:
        seen.append(forward)
        before(self, forward, state)

    monkeypatch.setattr(PAINT, "before_forward", keep)
    model, meta = model_of(dtype=dtype), SETTINGS[setting]
    with wrap(model, method(setting)), torch.no_grad():
        model(**inputs(sample, dtype))
    (expected,) = (one for one in meta["samples"] if one["name"] == sample)
    assert seen[0].patches is not None
    span = slice(*expected["image_span"])
    local, summary = (seen[0].patches.scores[read][0, span] for read in (LOCAL, SUMMARY))
    before = top(local, meta["rho"])
    strong = outliers(summary)
    for found, name in (
        (before, "local_before_removal"),
        (strong, "summary"),
        (before & ~strong, "local"),
    ):
        assert found.nonzero().flatten().tolist() == expected[name]
    recorded = arrays(f"paint/{setting}/{sample}")
    if "vit_cls_rows" in recorded and dtype == torch.float32:
        sums = recorded["vit_cls_rows"][:2].float().sum(1)
        torch.testing.assert_close(torch.stack((local, summary)), sums, rtol=0, atol=1e-5)
