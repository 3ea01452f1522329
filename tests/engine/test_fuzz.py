"""Anything against the reference: models, methods, heads, prompts and ways of generating are drawn.

In the suite the same examples are drawn every time; `--hypothesis-profile=long` draws thousands of
new ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import event, given
from torch import Tensor, nn

from eval.support import tiny
from eval.support.agreement import distance, generated
from eval.support.reference import Sample, logits, trace
from tests.support.agreement import generate
from tests.support.cases import MODES, ON_LOGITS, Case, cases
from vlm_patch import PatchError, wrap

STEPS, BEAMS = 3, 3
CLOSE = {True: 1e-9, False: 1e-5}
"""How far apart logits may be, in float64 (True) or float32."""
ROUNDING = {True: 1e-9, False: 1e-4}
"""How near to a threshold a number may lie before rounding may decide."""

UNCUT = "needs one that can be cut: use a DynamicCache of a model without sliding window"
ONE_BY_ONE = "sparc needs generated tokens one by one"
READ_TWICE = "memvr decides something for the whole prompt by the row that it edits"
NEVER = 10**6
"""The end of an answer: no token, which a method may leave as the only one that is likely."""
UNASKED = "without a question behind its image"

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Found:
    """What a model said. rows `[n, V]`: logits of `sample` from position `first` on."""

    sample: Sample
    first: int
    rows: Tensor


Run = Callable[[Case, nn.Module, dict[str, Tensor]], Callable[[], Iterator[Found]]]
"""Runs a wrapped model; what it gives is called once the model is stock again."""


@given(case=cases())
def test_anything(case: Case) -> None:
    event(case.mode)
    model, batch = case.build.model(), case.batch()
    methods = [method for _, method in case.methods]
    chunks = mock.patch("vlm_patch.engine.rows.WEIGHTS_BUDGET", 1 if case.chunks else 2**26)
    patch = wrap(model, *methods, heads=case.heads or None)
    with chunks, patch, patch.prompt(query=case.query):
        try:
            found = RUNS[case.mode](case, model, batch)
        except PatchError as error:
            uncut = UNCUT in str(error) and case.build.kind == "sliding"
            if case.mode == "second turn" and (uncut or READ_TWICE in str(error)):
                return
            if ONE_BY_ONE in str(error) and case.mode == "without cache":
                return
            if UNASKED in str(error) and any(spec.name == "icd" for spec in case.specs):
                return
            raise
    for one in found():
        compare(case, model, one)


def compare(case: Case, model: nn.Module, found: Found) -> None:
    """Raises AssertionError where they are apart and it was not for rounding to decide."""
    expected = logits(model, found.sample, case.specs, case.heads)
    rows = expected[found.first : found.first + len(found.rows)]
    error = distance(found.rows, rows)
    contrasts = sum(isinstance(spec, ON_LOGITS) for spec in case.specs)
    if error > CLOSE[case.build.exact] * 4**contrasts:  # which multiply what rounding did before
        margins = trace(model, found.sample, case.specs, case.heads).margins
        tight = {what: m for what, m in margins.items() if m < ROUNDING[case.build.exact]}
        assert tight, f"{error:.1e} apart"
        event("rounding decides")


def answers(
    case: Case, model: nn.Module, batch: dict[str, Tensor], each: int = 1, **options: Any
) -> Callable[[], Iterator[Found]]:
    """`each` sequences for every prompt."""
    torch.manual_seed(0)
    output = generate(model, batch, STEPS, eos_token_id=NEVER, **options)
    new, said = generated(batch, output), torch.stack(output.logits, 1)
    if "beam_indices" in output:  # the rows that a beam took
        said = said[output.beam_indices[:, :STEPS], torch.arange(STEPS)]
    return lambda: (
        Found(sample, sample.turns[-1].end - 1, rows)
        for offset in range(each)
        for sample, rows in zip(
            tiny.samples(model, batch, new[offset::each], **case.masks),
            said[offset::each],
            strict=True,
        )
    )


def greedy(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return answers(case, model, batch)


def sampled(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return answers(case, model, batch, do_sample=True, top_k=0)


def return_sequences(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return answers(case, model, batch, 2, do_sample=True, top_k=0, num_return_sequences=2)


def beams(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return answers(case, model, batch, BEAMS, num_beams=BEAMS, num_return_sequences=BEAMS)


def static(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return answers(case, model, batch, cache_implementation="static")


def without_cache(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """Every step reads all tokens again, so that an answer must not hold a placeholder."""
    return answers(case, model, batch, use_cache=False, suppress_tokens=[tiny.IMAGE])


def forward(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """Every row of the prompt."""
    given = dict(batch)
    if case.build.kind != "qwen2-vl":  # as generate() gives them
        given["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    # a cached prompt that ends in its image is the beginning of one, whose question follows
    given["use_cache"] = not (batch["input_ids"][:, -1] == tiny.IMAGE).any()
    with torch.no_grad():
        said = model(**given).logits
    return lambda: (
        Found(sample, 0, rows[-sample.length :])
        for sample, rows in zip(tiny.samples(model, batch, **case.masks), said, strict=True)
    )


ASKED = (30, 31, tiny.SINK_WORD, 8)


def second_turn(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """On the cache that the first one returned; its question is all of its text."""
    first = generate(model, batch, STEPS, eos_token_id=NEVER)
    count = len(first.sequences)
    ids = torch.cat([first.sequences, torch.tensor([ASKED] * count)], 1)
    padding = batch["attention_mask"]
    mask = torch.cat([padding, torch.ones_like(ids)[:, padding.shape[1] :]], 1)
    again = {"input_ids": ids, "attention_mask": mask}
    known = {"past_key_values": first.past_key_values}
    second = generate(model, again | known, STEPS, eos_token_id=NEVER)
    answer, later = generated(batch, first), generated(again, second)
    said = torch.stack(second.logits, 1)

    def found() -> Iterator[Found]:
        samples = tiny.samples(model, batch, answer[:, :-1], **case.masks)
        for row, sample in enumerate(samples):
            fed = torch.cat([answer[row, -1:], torch.tensor(ASKED)])
            fresh = torch.tensor([False] + [True] * len(ASKED))
            longer = sample.asked(model, fed, query=fresh).followed_by(model, later[row])
            yield Found(longer, longer.turns[-1].end - 1, said[row])

    return found


RUNS: dict[str, Run] = {
    run.__name__.replace("_", " "): run
    for run in (
        greedy,
        sampled,
        return_sequences,
        beams,
        static,
        without_cache,
        second_turn,
        forward,
    )
}


def test_every_way_is_drawn() -> None:
    assert sorted(RUNS) == sorted(MODES)
