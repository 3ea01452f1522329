"""Sinks of a real language model: SmolLM2-135M, of which shared/specs hold what was measured.

Its first token takes a third to 86 % of all attention in layers 12 to 29 by channel 507, at 23.8
times its RMS. The same channel stands at 10 to 15 times the RMS in every token, image-like inputs
reach 19.9, and in layers 3 to 10 some other text is a sink too.
"""

from typing import Any

import pytest
import torch

import vlm_patch
from tests.support import smollm
from tests.support.agreement import NO_PROCESSOR
from vlm_patch import VAR
from vlm_patch.methods.var import sink_score
from vlm_patch.primitives import sinks
from vlm_patch.primitives.sink_rules import SinkChannels, judge

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)

USER = [1, 4093, 198]
SYSTEM = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411]
SYSTEM += [407, 19712, 8182, 2, 198, *USER]
ANSWER = [2, 198, 1, 520, 9531, 198]
DESCRIBE = [198, 10180, 5125, 451, 2443, 281, 2202, 30, *ANSWER]
"Please describe this image in detail."
WHAT = [198, 1780, 314, 260, 555, 335, 260, 2049, 2103, 282, 260, 3252, 6961, 281, 260, 1369, 338]
WHAT += [314, 2141, 260, 2767, 47, *ANSWER]
"What is the man on the left side of the table holding in the hand that is near the dog?"
IS_THERE = [198, 4182, 665, 253, 2382, 1076, 47, *ANSWER]
"Is there a red car?"


@pytest.fixture(scope="module")
def model() -> Any:
    return smollm.llava()


@pytest.mark.parametrize(
    "prompts",
    [[(USER, DESCRIBE)], [(SYSTEM, WHAT)], [(USER, IS_THERE), (SYSTEM, DESCRIBE)]],
    ids=["describe", "what", "batch"],
)
def test_the_first_token_is_the_sink(
    prompts: list[tuple[list[int], list[int]]], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channel 507 and a threshold above all else in layers 12 to 28, whatever the prompt."""
    seen: list[Any] = []

    def catch(*args: torch.Tensor) -> SinkChannels:
        seen.extend((args, judge(*args)))
        return SinkChannels(())

    monkeypatch.setattr(sinks, "judge", catch)
    batch = smollm.inputs(*prompts)
    with vlm_patch.wrap(model, VAR()), torch.no_grad(), pytest.warns(match="VAR does nothing"):
        model(**batch)
    (blocks, attention, _, valid, _), found = seen
    assert (found.dims, found.reason) == ((507,), "")
    assert 20.5 < found.tau < 23.7
    assert set(range(12, 29)) <= set(found.layers) <= set(range(12, 30))
    flagged = (sink_score(blocks, found.dims) >= found.tau) & valid[:, None]
    first = torch.zeros_like(valid)
    first[torch.arange(len(first)), valid.long().argmax(1)] = True
    assert torch.equal(flagged[:, 12:29], first[:, None].expand(-1, 17, -1))
    assert (attention[:, 12:29][first[:, None].expand(-1, 17, -1)] > 0.3).all()
    assert not flagged[:, [0, 1, 2, 11]].any()


def test_what_is_found_acts_at_once_and_is_described(model: Any) -> None:
    batch = smollm.inputs((USER, DESCRIBE))
    with torch.no_grad():
        stock = model(**batch).logits[0, -1]
        with vlm_patch.wrap(model, VAR(min_image_mass=0.0)) as patch:
            assert "tau=None, dims=None" in patch.describe()
            assert patch.describe().endswith("; looks for its sinks at the first prompt")
            found = model(**batch).logits[0, -1]
            assert "tau=22.0, dims=(507,)" in patch.describe()
            assert patch.describe().endswith(
                "; found its sinks at the first prompt, measured in layers 12-29"
            )
        with vlm_patch.wrap(model, VAR(dims=[507], tau=22.0, min_image_mass=0.0)):
            known = model(**batch).logits[0, -1]
    assert torch.equal(found, known)
    assert (found - stock).abs().max() > 0.01
