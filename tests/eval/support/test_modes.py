"""Every way of generating is right or refused, and docs/generation.md says so."""

from unittest import mock

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import vlm_patch
from eval.support import pages, tiny
from eval.support.agreement import generated, ours, planted
from eval.support.modes import markdown
from eval.support.ways import (
    CLOSE,
    MODES,
    SIDES,
    Row,
    drafting,
    generate,
    half_right,
    in_two_processes,
    measure,
    off,
    prompt,
)
from tests.support.agreement import NO_PROCESSOR
from vlm_patch import PatchError

pytestmark = pytest.mark.filterwarnings(NO_PROCESSOR)
IN_PARTS = ("chunked prefill", "questions behind a cached image")
UNSEEN = {
    "chunked prefill": ("vhr", "vcd", "icd"),
    "questions behind a cached image": ("vhr", "icd"),
    "inputs_embeds": ("paint", "paint-guided", "vcd"),
    "image after text": ("icd",),
    "compiled, fullgraph": ("paint-guided", "vcd", "icd", "m3id", "dola", "deco"),
}
"""By way, the methods that cannot see there what they must see, or edit logits in a graph."""
REFUSED = {
    (name, side)
    for name, without in UNSEEN.items()
    for side, names in SIDES.items()
    if not set(names).isdisjoint(without)
}
REFUSED |= {
    (name, side)
    for name in ("prompt lookup", "assistant model", "use_cache=False")
    for side in SIDES
    if "sparc" in SIDES[side]
}
REFUSED |= {(name, side) for name in IN_PARTS for side in ("memvr", "vista")}
REFUSED |= {("gradient checkpointing in training", side) for side in ("nullu", "memvr", "vista")}
MIXED, PAINTED, EDITS = "all, map from an edited layer", "all and paint", "attention-side"
ON_LOGITS = "var and the logits' side"


@pytest.mark.parametrize("side", [MIXED, PAINTED, EDITS, ON_LOGITS])
@pytest.mark.parametrize("name", [name for name, mode in MODES.items() if mode.known])
def test_all_methods_together(name: str, side: str) -> None:
    row = measure(name, side)
    assert row.ok, row
    assert (row.max_error is None) == ((name, side) in REFUSED)


if tiny.FEATURES:

    @pytest.mark.parametrize(
        "side",
        ["var", "gift", "gift, map from an edited layer", "paint", "steering", "m3id", "dola"],
    )
    @pytest.mark.parametrize("name", IN_PARTS)
    def test_a_prompt_in_parts(name: str, side: str) -> None:
        row = measure(name, side)
        assert row.max_error is not None
        assert row.ok


def test_a_difference_is_not_ok() -> None:
    assert not Row("", "", 2 * CLOSE, 2 * CLOSE <= CLOSE, "").ok
    rows = [Row("beams", "var", 0.5, False, "so"), Row("beams", "vhr", None, True, "refused: no")]
    assert [line.split("|")[1:-1] for line in markdown(rows).splitlines()[2:3]] == [
        [
            " beams             ",
            " 1 of 2  ",
            " 5e-01         ",
            " so; refused: vhr; **wrong**: var ",
        ]
    ]
    assert markdown(rows).endswith("\n- refused: no")


def block() -> list[list[str]]:
    """The cells of the page's table."""
    text = pages.table("generation", "modes")
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_names_every_way_with_its_note() -> None:
    assert [cells[0] for cells in block()] == list(MODES)
    for name, count, error, note in block():
        refused = [side for mode, side in sorted(REFUSED) if mode == name]
        assert count == f"{len(SIDES) - len(refused)} of {len(SIDES)}"
        assert float(error) <= CLOSE
        assert note.startswith(MODES[name].note)
        assert all(side in note for side in refused)


# ---- beyond what the table asks


@pytest.mark.parametrize(
    "job", ["some heads", "some heads, all compared", "other semantics", "search for sinks"]
)
def test_in_two_processes(job: str) -> None:
    assert in_two_processes()[job] <= CLOSE


@pytest.mark.parametrize("names", [("var", "gift", "vhr"), ("gift-inside", "var-release")])
def test_drafts_are_taken_and_dropped(names: tuple[str, ...]) -> None:
    """Four rows a forward, of which three are kept; the first holds the prompt too, whose last row
    is GIFT's and VHR's.
    """
    model = planted("llava")
    batch = prompt(model, tiny.ONE_IMAGE)
    seen: list[int] = []
    with vlm_patch.wrap(model, *ours(names)):
        plain = generate(model, batch, 12)
        drafts = half_right(generated(batch, plain)[0], batch["input_ids"].shape[1])
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        with mock.patch.object(PromptLookupCandidateGenerator, "get_candidates", drafts):
            output = generate(model, batch, 12, prompt_lookup_num_tokens=3)
    assert seen == [4, 4, 4, 4]
    assert torch.equal(output.sequences, plain.sequences)
    assert off(model, batch, output, names) <= CLOSE


def test_a_patched_model_can_draft_too() -> None:
    """Its own layout goes on: what the other model wrote is no new question."""
    model, helper, names = planted("llava"), drafting(planted("llava")), ("var", "gift", "vhr")
    batch = prompt(model, tiny.ONE_IMAGE)
    with vlm_patch.wrap(model, *ours(names)), vlm_patch.wrap(helper, *ours(names)):
        output = generate(model, batch, 8, assistant_model=helper)
    assert off(model, batch, output, names) <= CLOSE


def test_drafts_behind_a_returned_cache_are_refused() -> None:
    """transformers reads the whole conversation again there, on top of what is cached."""
    model = planted("llava")
    batch = prompt(model, tiny.ONE_IMAGE)
    with vlm_patch.wrap(model, *ours(["var"])):
        first = generate(model, batch, 3)
        again = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
        with pytest.raises(PatchError) as caught:
            generate(model, again, prompt_lookup_num_tokens=3)
    assert str(caught.value) == (
        "generate(prompt_lookup_num_tokens=3) cannot go on behind a cache that holds 27 tokens: "
        "transformers would read the conversation a second time. Leave prompt_lookup_num_tokens "
        "out, or give the whole conversation without a cache."
    )
