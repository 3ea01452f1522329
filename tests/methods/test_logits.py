"""The mathematics of what edits logits: VCD's noise, M3ID's weight, DoLa's and DeCo's choice."""

import math
from typing import Any

import pytest
import torch

from eval.support.reference import streams
from vlm_patch import ICD, M3ID, PAINT, VCD, DeCo, DoLa
from vlm_patch.method import ModelInfo
from vlm_patch.methods.deco import candidates, corrected
from vlm_patch.methods.dola import contrasted_layers, divergence
from vlm_patch.methods.m3id import gated, weight
from vlm_patch.methods.vcd import diffused, schedule


def rows(*values: float) -> torch.Tensor:
    """Logits `[1, V]` of probabilities."""
    return torch.tensor([values], dtype=torch.float64).log()


def test_vcd_schedule() -> None:
    """The factors recorded from the release, to the digits printed."""
    for step, image, noise in ((500, 0.863017, 0.505175), (999, 0.285043, 0.958515)):
        left = schedule()[step]
        # in float32 there
        assert math.sqrt(left) == pytest.approx(image, abs=1e-6)
        assert math.sqrt(1 - left) == pytest.approx(noise, abs=1e-6)


def test_vcd_noise_repeats_whatever_stands_beside_the_image() -> None:
    pixels = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    method = VCD(noise_step=700, seed=5)
    alone = [method.noised(image) for image in pixels]
    difference = diffused(pixels[0] - pixels[1], torch.zeros(1), 700)
    torch.testing.assert_close(alone[0] - alone[1], difference)
    expected = streams.noised(streams.Vcd(noise_step=700, seed=5), pixels[0])
    torch.testing.assert_close(alone[0], expected)
    assert not torch.equal(VCD(noise_step=700, seed=6).noised(pixels[0]), alone[0])


def test_m3id_weight_and_gate() -> None:
    """lambda 0.02: (1 - e^-0.02) / e^-0.02 = 0.0202 at the first token, 6.389 at the 100th."""
    found = weight(0.02, torch.tensor([1.0, 100.0]))
    torch.testing.assert_close(found, torch.tensor([0.020201, 6.389056]))
    sure, unsure = rows(0.9, 0.1), rows(0.5, 0.5)
    assert torch.equal(gated(sure + 1, sure, 0.8), sure)
    assert torch.equal(gated(unsure + 1, unsure, 0.8), unsure + 1)


def test_dola_takes_the_layer_that_differs_most() -> None:
    """Of two early layers one is the last one's own: nothing would be left of that contrast."""
    last = rows(0.6, 0.3, 0.1)
    near, far = rows(0.6, 0.3, 0.1), rows(0.1, 0.3, 0.6)
    assert float(divergence(last, near)) == pytest.approx(0.0, abs=1e-12)
    half = (0.6 * math.log(0.6 / 0.35) + 0.1 * math.log(0.1 / 0.35)) / 2
    assert float(divergence(last, far)) == pytest.approx(2 * half)
    found = contrasted_layers(last, torch.stack([near, far]), 0.0)
    torch.testing.assert_close(found, rows(6.0, 1.0, 1 / 6))
    found = contrasted_layers(last, torch.stack([near, far]), 0.2)
    assert found.isfinite().tolist() == [[True, True, False]]


def test_dola_chooses_row_by_row() -> None:
    last = torch.cat([rows(0.6, 0.3, 0.1)] * 2)
    flat, far = rows(1 / 3, 1 / 3, 1 / 3), rows(0.1, 0.3, 0.6)
    early = torch.stack([torch.cat([flat, far]), torch.cat([far, flat])])
    found = contrasted_layers(last, early, 0.0)
    torch.testing.assert_close(found[0], found[1])


def test_deco_candidates_and_layer() -> None:
    """0.5 + 0.3 do not reach 0.9, with 0.15 they do. The second layer is surest, of token 1."""
    last = rows(0.5, 0.3, 0.15, 0.05)
    kept = candidates(last, 0.9, 20)
    assert kept.tolist() == [[True, True, True, False]]
    assert candidates(last, 0.9, 2).tolist() == [[True, True, False, False]]
    assert candidates(last, 1.0, 20).all()
    early = torch.stack([rows(0.4, 0.1, 0.1, 0.4), rows(0.1, 0.6, 0.2, 0.1)])
    found = corrected(last, early, kept, 0.6)
    expected = last + 0.6 * 0.6 * early[1]
    torch.testing.assert_close(found[kept], expected[kept])
    assert found[0, 3] == -torch.inf
    # what no candidate is counts for nothing, however sure a layer is of it
    stray = torch.stack([rows(0.01, 0.01, 0.01, 0.97), rows(0.1, 0.6, 0.2, 0.1)])
    torch.testing.assert_close(corrected(last, stray, kept, 0.6), found)


@pytest.mark.parametrize(
    ("method", "depth", "layers"),
    [
        (DoLa(), 32, tuple(range(0, 16, 2))),
        (DoLa(), 4, (0,)),
        (DeCo(), 32, tuple(range(20, 29))),
        (DeCo(), 40, tuple(range(25, 36))),
        (DeCo(), 4, (2, 3)),
        (DoLa(layers=[1]), 4, (1,)),
    ],
)
def test_default_layers(method: Any, depth: int, layers: tuple[int, ...]) -> None:
    info = ModelInfo(depth, 64, 4, {})
    found, notes = method.resolve(info)
    assert found.early_layers() == layers
    assert bool(notes) == (isinstance(method, DeCo) and depth != 32)


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        (VCD, {"alpha": -1}, "VCD alpha: found -1, expected a finite number of at least 0"),
        (VCD, {"beta": 2}, "VCD beta: found 2, expected a number from 0 to 1"),
        (
            VCD,
            {"noise_step": 1000},
            "VCD noise_step: found 1000, expected an integer from 0 to 999",
        ),
        (VCD, {"seed": 0.5}, "VCD seed: found 0.5, expected an integer of at least 0"),
        (ICD, {"prefix": ""}, "ICD prefix: found '', expected a text or token ids"),
        (ICD, {"prefix": [-1]}, "ICD prefix: found -1, expected an integer of at least 0"),
        (M3ID, {"gate": 1.5}, "M3ID gate: found 1.5, expected a number from 0 to 1"),
        (M3ID, {"decay": -0.1}, "M3ID decay: found -0.1, expected a finite number of at least 0"),
        (DoLa, {"beta": -1}, "DoLa beta: found -1, expected a number from 0 to 1"),
        (DeCo, {"top_k": 0}, "DeCo top_k: found 0, expected an integer of at least 1"),
        (DeCo, {"top_p": 0}, "DeCo top_p: found 0, expected a number from 0 to 1"),
        (PAINT, {"gamma": 0.9}, "PAINT gamma: found 0.9, expected a finite number of at least 1"),
    ],
)
def test_values_out_of_range(kind: Any, values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="found") as caught:
        kind(**values)
    assert str(caught.value).startswith(text)
