"""IAT and AdaIAT: worked by hand, the calibration and its file, which keys are generated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eval.support import tiny
from eval.support.agreement import CALIBRATION, generated, planted
from tests.methods.test_attention_edits import context, info
from tests.support.agreement import NO_PROCESSOR, generate
from tests.support.examples import assert_near, mask, tensor
from vlm_patch import IAT, AdaIAT, wrap
from vlm_patch.method import ForwardContext, Phase, Position
from vlm_patch.methods.adaiat import Calibration, boost_shares, generated_attention

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR, "ignore:no published settings")


def step(prompt_end: int, keys: int) -> ForwardContext:
    """The forward of a generated token of a prompt with one image token."""
    forward = context(mask([1], keys)[None])
    forward.position = Position(keys - 1, Phase.DECODE, prompt_end=prompt_end)
    forward.rows = torch.tensor([0])
    return forward


def edited(method: Any, forward: ForwardContext, given: Tensor, layer: int = 0) -> Tensor:
    state = method.state()
    method.before_forward(forward, state)
    edit = method.edit_scores if method.edits_scores else method.edit_weights
    found: Tensor = edit(layer, given, forward, state)
    return found


def test_iat_by_hand() -> None:
    """BOS, image, question, then two generated tokens, the row's own among them."""
    scores = tensor([[[[1.0, 2.0, 3.0, -1.0, 2.0]]]])
    assert_near(edited(IAT(0.8), step(3, 5), scores), [[[[1.0, 2.0, 3.0, -0.2, 3.6]]]])


# two heads: ratios 2 and 0.5, both sums over heads 0.3, and so the threshold for any beta
TABLES = Calibration(tensor([[0.2, 0.1]]), tensor([[0.1, 0.2]]))


def test_adaiat_by_hand() -> None:
    """Means over two generated tokens 0.15 and 0.1, together below 0.3: factors 4 and 0."""
    weights = tensor([[[[0.4, 0.3, 0.1, 0.2]], [[0.5, 0.3, 0.2, 0.0]]]])
    found = edited(AdaIAT(TABLES, 3.0), step(2, 4), weights)
    assert_near(found[0, 0, 0], [0.4 / 1.9, 0.3 / 1.9, 0.4 / 1.9, 0.8 / 1.9])
    assert_near(found[0, 1, 0], [0.5 / 0.8, 0.3 / 0.8, 0.0, 0.0])


def test_adaiat_rests_where_the_layer_looks_enough() -> None:
    weights = tensor([[[[0.3, 0.3, 0.2, 0.2]], [[0.5, 0.2, 0.2, 0.1]]]])  # means 0.2 + 0.15
    assert torch.equal(edited(AdaIAT(TABLES, 3.0), step(2, 4), weights), weights)


def test_each_sample_has_a_gate_of_its_own() -> None:
    masses = torch.full((2, 2, 1, 1), 0.5, dtype=torch.float64)
    masses[:, 1] = 1
    shares = boost_shares(masses, tensor([[3.0]]), torch.tensor([True, False])[:, None, None])
    assert_near(shares[:, :, 0, 0], [[1.0, 0.5], [0.0, 1.0]])


def test_the_first_token_of_an_answer_is_the_stock_models() -> None:
    model = planted("llava")
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    stock = generate(model, batch, 3)
    for method in (IAT(layers=(1, 2)), AdaIAT(CALIBRATION, layers=(0, 1, 2, 3))):
        with wrap(model, method):
            found = generate(model, batch, 3)
        assert torch.equal(found.logits[0], stock.logits[0])
        assert not torch.equal(found.logits[1], stock.logits[1])


def test_a_calibration_by_hand(tmp_path: Path) -> None:
    attention = tensor(
        [[[0.2, 0.4]], [[0.4, 0.0]], [[0.1, 0.2]]]
    )  # three tokens, a layer, two heads
    found = Calibration.measure(attention, torch.tensor([True, True, False]))
    assert_near(found.real, [[0.3, 0.2]])
    assert_near(found.hallucinated, [[0.1, 0.2]])
    assert_near(found.thresholds(0.5), [0.4])
    found.save(tmp_path / "one.safetensors")
    assert repr(found) == "Calibration(1 layers x 2 heads)"
    again = Calibration.load(tmp_path / "one.safetensors")
    assert_near(again.surplus(), [[2.0, 0.0]])


def test_what_a_calibration_is_measured_on() -> None:
    """The means of the stock model, as AdaIAT itself sees them."""
    model = tiny.plant(tiny.llava(attn="eager"))
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with torch.no_grad():
        output = model.generate(
            **batch, **options, output_attentions=True, return_dict_in_generate=True
        )
        prompt = batch["input_ids"].shape[1]
        found = generated_attention(output.attentions, prompt)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
        whole = model(
            **batch | {"input_ids": output.sequences, "attention_mask": mask},
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            output_attentions=True,
        ).attentions
    assert found.shape == (3, 3, 4, 4)
    for row in range(3):
        expected = torch.stack([w[:, :, prompt + row, prompt:][..., : row + 1] for w in whole], 1)
        torch.testing.assert_close(found[:, row], expected.mean(-1), rtol=0, atol=1e-5)
    assert generated(batch, output).shape == (3, 4)


BAD = [
    (lambda path: IAT(1.2), "IAT alpha: found 1.2, expected at most 1, since beyond it"),
    (lambda path: AdaIAT(), "AdaIAT calibration: found None, expected a Calibration or the file"),
    (lambda path: AdaIAT(TABLES, -1), "AdaIAT alpha: found -1, expected a finite number"),
    (
        lambda path: AdaIAT(TABLES).resolve(info(4)),
        "AdaIAT calibration: found a table (1, 2), this model has 4 layers of 4 heads",
    ),
    (
        lambda path: AdaIAT(str(path / "none")).resolve(info(4)),
        "AdaIAT calibration: cannot read '",
    ),
    (
        lambda path: AdaIAT(str(path / "other.safetensors")).resolve(info(4)),
        "AdaIAT calibration: '",
    ),
    (
        lambda path: Calibration.measure(torch.ones(2, 1, 1), torch.tensor([True, True])),
        "calibration: found 2 real objects of 2, expected some that are and some that are not",
    ),
    (
        lambda path: Calibration.measure(torch.ones(2, 1), torch.tensor([True, False])),
        "calibration: found attention (2, 1) and real torch.bool (2,), expected [N, layers, heads]",
    ),
]


@pytest.mark.parametrize(("make", "text"), BAD, ids=[text for _, text in BAD])
def test_wrong_values(make: Any, text: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"found|holds|cannot read") as caught:
        make(tmp_path)
    assert str(caught.value).startswith(text)


def test_layers() -> None:
    assert list(IAT().resolve(info(32))[0].default_layers(32)) == [*range(5, 18)]
    assert IAT().alpha == 0.8
    assert (AdaIAT(TABLES).alpha, AdaIAT(TABLES).beta) == (6.0, 0.5)
