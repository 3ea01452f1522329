"""PAI against recordings of its release (LALBJ/PAI, MIT) on a tiny LLaVA.

The image stream with the tokens that came out there; both readings of the prefill.
"""

import json
from typing import Any

import pytest
import torch

from tests.engine.test_paint_release import PARITY, arrays, inputs, model_of
from tests.support.agreement import NO_PROCESSOR
from vlm_patch import PAI, wrap

SETTINGS: dict[str, Any] = {
    folder.name: json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for folder in sorted((PARITY / "pai").iterdir())
}
RUNS = [(name, sample["name"]) for name, meta in SETTINGS.items() for sample in meta["samples"]]
pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


def method(setting: str) -> PAI:
    meta = SETTINGS[setting]
    layers = range(meta["start_layer"], meta["end_layer"])
    semantics = "release" if meta["edited_passes"] == "decode steps only" else "paper"
    return PAI(meta["alpha"] if meta["use_attn"] else 0.0, layers, semantics)


def test_presets_are_among_the_recordings() -> None:
    found, release = method("guided_alpha0.5_gamma1.1"), PAI.release()
    assert (found.alpha, found.semantics) == (release.alpha, release.semantics)
    assert method("attention_alpha0.2").alpha == PAI.paper().alpha
    readings = [method(f"guided{kind}_alpha0.5_gamma1.1") for kind in ("", "_edit_in_prefill")]
    assert [one.semantics for one in readings] == ["release", "paper"]


@pytest.mark.parametrize(("setting", "sample"), RUNS)
def test_logits_and_rows_with_the_tokens_of_the_release(setting: str, sample: str) -> None:
    recorded = arrays(f"pai/{setting}/{sample}")
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
    if method(setting).semantics == "release":  # row 0 is the stock model's, bit for bit
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
    recorded = arrays(f"pai/{setting}/{sample}")["generated"].long()
    model, given = model_of(), inputs(sample)
    with wrap(model, method(setting)):
        output = model.generate(**given, do_sample=False, max_new_tokens=len(recorded))
    assert torch.equal(output[0, given["input_ids"].shape[1] :], recorded)
