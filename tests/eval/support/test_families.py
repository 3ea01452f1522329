"""`python -m eval models`: what it measures, and that docs/models.md says what it finds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from eval.__main__ import main
from eval.support import check, families, pages
from eval.support.build import CLASSES, build
from eval.support.check import Subject, measure
from eval.support.families import Row, markdown, verified
from vlm_patch import GIFT

STATED: dict[str, tuple[str, str]] = {
    kind: (cells[1], cells[2])
    for line in pages.table("models", "models").splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.split("|")[1:4]]) == 3
    for kind in cells[0].split(", ")
    if kind in CLASSES
}


pytestmark = pytest.mark.filterwarnings("ignore:no published settings", "ignore:No processor")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with families.quietly():
        yield


@pytest.mark.parametrize("kind", STATED)
def test_the_page_says_what_is_measured(kind: str) -> None:
    """In the version that it names; in another one the stock model of a type may not run at all."""
    row = measure(kind)
    broken = row.note.startswith("the stock model does not run")
    if not broken or f"types of transformers {transformers.__version__}," in pages.table(
        "models", "models"
    ):
        assert (verified(row), row.note) == STATED[kind]


def test_as_many_families_as_promised() -> None:
    """At least 60 unchanged by the patch itself, at least 50 with every method at work."""
    assert len(STATED) >= 97
    results = [how for how, _ in STATED.values()]
    assert sum(how != families.NONE for how in results) >= 79
    assert results.count(families.BOTH) >= 76


# ---- each check can fail


def faults(subject: Subject) -> str:
    return "; ".join(check._faults(subject))


def test_a_method_that_does_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "METHODS", (GIFT(alpha=0.0), *check.METHODS[2:]))
    assert faults(Subject("llava")) == "acting: vhr; gift changes nothing"


def test_image_keys_in_the_wrong_place_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ovis2's separators come from the vision side; without them keys are missing."""
    monkeypatch.setattr("vlm_patch.models.info.SPECIAL", {})
    assert faults(Subject("ovis2")) == "the image lands elsewhere than at the image keys"


def test_rows_that_come_out_wrong_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The softcap of Gemma 2's scores is one thing that an explicit row must not forget."""
    subject = Subject("llava")
    right = subject.stock
    subject.stock = right + 1e-3
    assert check._recomputing(subject) == "rows computed anew are 1.0e-03 from the kernel's"


def test_traces_are_seen() -> None:
    subject = Subject("llava")
    subject.model.config.text_config.head_dim = 8
    assert faults(subject) == "remove() does not restore the model"


def test_a_wrapped_model_that_differs_is_seen() -> None:
    subject = Subject("llava")
    assert check.delegates(subject)
    subject.stock = torch.nextafter(subject.stock, torch.tensor(torch.inf))
    assert not check.delegates(subject)


def test_a_model_that_does_not_run_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str) -> Any:
        model = build(kind)
        del model.model.multi_modal_projector, model.model.language_model.norm
        return model

    monkeypatch.setattr(check, "build", broken)
    row = measure("llava")
    assert (row.delegation, row.end_to_end) == (False, False)
    assert row.note.startswith("the stock model does not run: ")


# ---- the command


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "models.json"
    assert main(["models", "--types", "llava, blip", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    assert json.loads(printed) == [
        {"type": "llava", "delegation": True, "end_to_end": True, "note": ""},
        {
            "type": "blip",
            "delegation": False,
            "end_to_end": False,
            "note": "refused: its attention does not go through transformers' interface",
        },
    ]


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--types", "llava,qwen3_5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Of 2 types of transformers 5.")
    assert lines[2:] == [
        "| family | verified | notes |",
        "| --- | --- | --- |",
        "| llava | off and end to end |  |",
        "| qwen3_5 | off and end to end | hybrid: the methods act in its softmax layers, here 1 of "
        "0-2 |",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--types", "llama"], "unknown type 'llama'"),
        (["--types", "llava", "--docs"], "the table of docs/models.md holds every type"),
    ],
)
def test_what_cannot_be_done(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_table_is_written_between_its_marks() -> None:
    row = Row("llava", True, True)
    rows = [row, replace(row, type="aria"), Row("blip", False, False, "refused: so")]
    before = "a\n<!-- models:begin -->\nold\n<!-- models:end -->\nb\n"
    after = f"a\n<!-- models:begin -->\n{markdown(rows)}<!-- models:end -->\nb\n"
    assert pages.replaced(before, "models", markdown(rows)) == after
    assert pages.replaced(after, "models", markdown(rows)) == after
    assert "| llava, aria | off and end to end |  |\n| blip | - | refused: so |\n" in after
