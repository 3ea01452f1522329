"""Contrasts of logits: worked values, and what leaves them as they are."""

import math

import torch

from vlm_patch.primitives.contrast import contrasted, cut, guided

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
OTHER = torch.tensor([[1.0, 2.0, 0.5, -2.0]], dtype=torch.float64)


def test_worked_values() -> None:
    """alpha 1: 2 l - l'. At 0.1 of the likeliest: 2 + ln 0.1 = -0.303 drops the last token."""
    mixed = contrasted(LOGITS, OTHER, 1.0)
    torch.testing.assert_close(mixed, mixed.new_tensor([[3.0, 0.0, -0.5, -2.0]]))
    assert cut(mixed, LOGITS, 0.1).tolist() == [[3.0, 0.0, -0.5, -math.inf]]
    assert cut(mixed, LOGITS, 0.2).tolist() == [[3.0, 0.0, -math.inf, -math.inf]]
    p, q = LOGITS.log_softmax(-1), OTHER.log_softmax(-1)
    expected = (1.1 * p - 0.1 * q)[:, :3]
    torch.testing.assert_close(guided(LOGITS, OTHER, 1.1, 0.1)[:, :3], expected)


def test_nothing_is_changed_by_nothing() -> None:
    assert torch.equal(cut(contrasted(LOGITS, OTHER, 0.0), LOGITS, 0.0), LOGITS)
    p = LOGITS.log_softmax(-1)
    assert torch.equal(guided(LOGITS, OTHER, 1.0, 0.0), p)


def test_what_is_out_stays_out() -> None:
    """A method behind another one meets its -inf, also with a contrast of nothing."""
    out = LOGITS.clone()
    out[0, 1] = -torch.inf
    for alpha in (0.0, 0.5, torch.zeros(1, 1, dtype=torch.float64)):
        found = contrasted(out, OTHER, alpha)
        assert found.isfinite().tolist() == [[True, False, True, True]]
    assert guided(out, OTHER, 1.3, 0.0).isfinite().tolist() == [[True, False, True, True]]
