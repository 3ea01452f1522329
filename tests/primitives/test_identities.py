"""The seven identities of the catalogue, to 1e-12: one form of an edit is another's."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.support.examples import EXAMPLES, mask, tensor
from vlm_patch.methods.adhh import text_shares
from vlm_patch.methods.mass_target import target_shares
from vlm_patch.methods.var import key_groups, redistribute
from vlm_patch.primitives.key_bias import raised, scaled
from vlm_patch.primitives.reweighting import reweight

GIVEN, EXPECTED = EXAMPLES["identities"]["inputs"], EXAMPLES["identities"]["expected"]
SCORES = tensor(GIVEN["logits"])[None, None, None]
WEIGHTS = SCORES.softmax(-1)
VALUES = tensor(GIVEN["values"])
FACTORS = tensor(GIVEN["weights"])


def same(found: Tensor, expected: object) -> None:
    """To 1e-12; what is written down has twelve decimals."""
    expected = expected if isinstance(expected, Tensor) else tensor(expected)
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-12)


def group(name: str) -> Tensor:
    return mask(GIVEN[f"group_{name}"], 6)[None]


def by_keys(weights: Tensor, factors: Tensor, shares: Tensor | None = None) -> Tensor:
    """Weights whose keys are multiplied by `factors` `[K]`, as groups of one key each."""
    one = torch.eye(6, dtype=torch.float64)[None]
    return reweight(weights, one, lambda masses, _: factors[None, :, None, None].expand_as(masses))


def test_the_softmax() -> None:
    same(WEIGHTS, EXPECTED["attention"])


def test_1_a_renormalised_reweight_is_a_bias() -> None:
    weighted = by_keys(WEIGHTS, FACTORS)
    found = weighted / weighted.sum(-1, keepdim=True)
    same(found, (SCORES + FACTORS.log()).softmax(-1))
    same(found, EXPECTED["1_renormalised_reweight"])


def test_2_without_renormalising_it_is_a_bias_and_a_head_scale() -> None:
    """And so is a scale of the values, which need not be touched for it."""
    found = by_keys(WEIGHTS, FACTORS) @ VALUES
    scale = (FACTORS * WEIGHTS).sum(-1, keepdim=True)
    same(found, scale * ((SCORES + FACTORS.log()).softmax(-1) @ VALUES))
    same(found, WEIGHTS @ (FACTORS[:, None] * VALUES))
    same(found, EXPECTED["2_unnormalised_output"])
    same(scale, EXPECTED["2_head_scale"])


def test_3_ad_hh_is_no_text_and_a_head_scale() -> None:
    text = group("T")
    groups = torch.stack((text, torch.ones_like(text)), 1).double()
    found = reweight(WEIGHTS, groups, lambda masses, _: text_shares(masses, 0.0)) @ VALUES
    scale = 1 - (WEIGHTS * text).sum(-1, keepdim=True)
    hidden = SCORES.masked_fill(text, -torch.inf)
    same(found, scale * (hidden.softmax(-1) @ VALUES))
    same(found, EXPECTED["3_zeroed_output"])
    same(scale, EXPECTED["3_head_scale"])


def test_4_multiplied_scores_are_a_bias_of_both_signs() -> None:
    chosen = group("G")
    coefficients = (GIVEN["g"] - 1) * chosen.double()
    found = scaled(SCORES, coefficients)
    same(found, torch.where(chosen, GIVEN["g"] * SCORES, SCORES))
    same(found.softmax(-1), EXPECTED["4_multiplied_logits_attention"])
    positive = SCORES > 0
    same(found[positive], raised(SCORES, coefficients)[positive])
    assert (found <= raised(SCORES, coefficients)).all()


def test_5_a_mass_target_is_a_bias() -> None:
    chosen, target = group("G"), GIVEN["target_mass"]
    groups = torch.stack((chosen, ~chosen, torch.ones_like(chosen)), 1).double()
    found = reweight(WEIGHTS, groups, lambda masses, _: target_shares(masses, target))
    mass = (WEIGHTS * chosen).sum()
    bias = torch.logit(tensor(target)) - torch.logit(mass)
    same(bias, EXPECTED["5_bias"])
    same(found, (SCORES + bias * chosen).softmax(-1))
    same(found, EXPECTED["5_attention"])
    same((found * chosen).sum(), target)


def test_6_a_mass_that_moves_is_a_bias() -> None:
    """VAR's step: from the sink A to the image B."""
    sink, image = group("A"), group("B")
    groups = key_groups(image | sink, sink).double()
    found = redistribute(WEIGHTS, groups, 1 - GIVEN["rho"], 0.0, 0.0)
    mass = [(WEIGHTS * one).sum() for one in (sink, image)]
    gain = 1 + (1 - GIVEN["rho"]) * mass[0] / mass[1]
    factors = torch.where(sink, GIVEN["rho"], torch.where(image, gain, 1.0))
    same(gain, EXPECTED["6_w_B"])
    same(found, (SCORES + factors.log()).softmax(-1))
    same(found, EXPECTED["6_attention"])
    same(found.sum(), 1.0)


def test_7_an_edit_of_the_last_row_splits() -> None:
    """Rows before it by the stock kernel, and it alone by hand, are the full eager computation."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64, generator=draw)
    strength = 0.7 * (torch.arange(9) % 2).double()
    scores = query @ key.transpose(-1, -2) / 8**0.5
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    edited = torch.cat((scores[..., :-1, :], raised(scores[..., -1:, :], strength)), 2)
    whole = edited.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    rows = scaled_dot_product_attention(query, key, value, is_causal=True)[..., :-1, :]
    last = raised(query[..., -1:, :] @ key.transpose(-1, -2) / 8**0.5, strength)
    same(torch.cat((rows, last.softmax(-1) @ value), 2), whole)
