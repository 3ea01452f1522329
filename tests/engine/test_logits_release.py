"""VCD, and the contrasts of PAI and PAINT, against recordings of their releases on a tiny LLaVA:
logits of the second stream, scores, tokens, under greedy `generate` (see tests/data/parity).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from eval.support.agreement import distance
from tests.engine.test_paint_release import PARITY, SETTINGS, arrays, inputs, method, model_of
from tests.support.agreement import NO_PROCESSOR
from vlm_patch import VCD, Method, wrap
from vlm_patch.method import Branch, ForwardContext
from vlm_patch.methods.vcd import diffused
from vlm_patch.primitives.contrast import contrasted, cut, guided

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)


def runs(method: str, *names: str) -> list[tuple[Path, dict[str, Any]]]:
    """The recordings of settings, each with what is known of its sample."""
    found = []
    for name in names:
        folder = PARITY / method / name
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found += [(folder, {**meta, **sample}) for sample in meta["samples"]]
    return found


def said(wrapped: Method, name: str, steps: int) -> tuple[Tensor, Tensor]:
    """The new tokens `[n]` and their logits `[n, V]` of greedy search, a method on."""
    model = model_of()
    with wrap(model, wrapped):
        output = model.generate(
            **inputs(name),
            do_sample=False,
            max_new_tokens=steps,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences[0, -steps:], torch.stack(output.logits, 1)[0]


def matches(wrapped: Method, name: str, recorded: Mapping[str, Tensor]) -> None:
    tokens, scores = said(wrapped, name, len(recorded["generated"]))
    assert torch.equal(tokens, recorded["generated"].long())
    assert distance(scores, recorded["scores"].float()) <= 1e-4


@pytest.mark.parametrize(("folder", "sample"), runs("vcd", "mha/default", "mha/pope_script"))
def test_vcd(folder: Path, sample: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise that came out there; the release's own greedy search leaves it out."""
    recorded = arrays(str(folder.relative_to(PARITY) / sample["name"]))
    pixels = recorded["noised_pixel_values"].float()
    monkeypatch.setattr(VCD, "noised", lambda self, image: pixels)
    matches(VCD(sample["cd_alpha"], sample["cd_beta"]), sample["name"], recorded)
    streams = (recorded[name].float() for name in ("logits", "noised_logits"))
    logits, noised = streams
    found = cut(contrasted(logits, noised, sample["cd_alpha"]), logits, sample["cd_beta"])
    assert distance(found, recorded["scores"].float()) <= 1e-4


@pytest.mark.parametrize(("folder", "sample"), runs("vcd", "mha/default"))
def test_vcd_noise(folder: Path, sample: dict[str, Any]) -> None:
    """The release's draw, recorded in float16."""
    image = inputs(sample["name"])["pixel_values"][0]
    draw = torch.Generator().manual_seed(sample["noise_seed"])
    found = diffused(image, torch.randn(image.shape, generator=draw), sample["noise_step"])
    recorded = arrays(str(folder.relative_to(PARITY) / sample["name"]))["noised_pixel_values"]
    torch.testing.assert_close(found, recorded.float(), rtol=1e-3, atol=1e-3)
    mine = VCD(noise_step=sample["noise_step"], seed=sample["noise_seed"]).noised(image)
    assert torch.equal(mine, found)


@pytest.mark.parametrize(
    ("folder", "sample"), runs("paint", "guided_release", "guided_edit_in_prefill")
)
def test_paint(folder: Path, sample: dict[str, Any]) -> None:
    """Both readings of the prompt's last row."""
    setting = folder.name
    recorded = arrays(f"paint/{setting}/{sample['name']}")
    guiding = replace(method(setting), gamma=SETTINGS[setting]["gamma"])
    matches(guiding, sample["name"], recorded)


@dataclass(frozen=True)
class Contrast(Method):
    """PAI's second half."""

    name: ClassVar[str] = "contrast"

    def branches(self) -> Mapping[str, Branch]:
        return {"no image": Branch(image=False)}

    def edit_logits(
        self,
        logits: Tensor,
        others: Mapping[str | int, Tensor],
        forward: ForwardContext,
        state: Any,
    ) -> Tensor:
        return guided(logits, others["no image"], 1.1, 0.1)


@pytest.mark.parametrize(("folder", "sample"), runs("pai", "contrast_only_gamma1.1"))
def test_pai_contrast(folder: Path, sample: dict[str, Any]) -> None:
    matches(Contrast(), sample["name"], arrays(f"pai/{folder.name}/{sample['name']}"))


@pytest.mark.parametrize(
    ("folder", "sample"),
    runs("pai", "guided_alpha0.5_gamma1.1", "guided_edit_in_prefill_alpha0.5_gamma1.1"),
)
def test_pai_contrast_of_recorded_streams(folder: Path, sample: dict[str, Any]) -> None:
    recorded = arrays(f"pai/{folder.name}/{sample['name']}")
    streams = (recorded[name].float() for name in ("logits", "uncond_logits"))
    found = guided(*streams, gamma=1.1, beta=0.1)
    assert distance(found, recorded["scores"].float()) <= 1e-4
