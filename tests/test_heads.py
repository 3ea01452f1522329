"""The spellings of a head table, on 4 layers x 3 heads unless a test says otherwise."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.support import tiny
from vlm_patch import VAR, VHR, Patch, heads, wrap

SHAPE = (4, 3)


def on(*cells: tuple[int, int]) -> Tensor:
    table = torch.zeros(SHAPE, dtype=torch.bool)
    for layer, head in cells:
        table[layer, head] = True
    return table


def wrapped() -> tuple[nn.Module, Patch]:
    model = tiny.llava()
    return model, wrap(model, VAR(dims=tiny.SINK_DIMS, tau=3.0), VHR(layers=[1, 2]))


@pytest.mark.parametrize(
    ("spec", "cells"),
    [
        ("all", [(layer, head) for layer in range(4) for head in range(3)]),
        (" all ", [(layer, head) for layer in range(4) for head in range(3)]),
        ("*", [(layer, head) for layer in range(4) for head in range(3)]),
        ("2:0", [(2, 0)]),
        ("2", [(2, 0), (2, 1), (2, 2)]),
        ("2:*", [(2, 0), (2, 1), (2, 2)]),
        ("1:0,2", [(1, 0), (1, 2)]),
        ("1:0-1", [(1, 0), (1, 1)]),
        ("1-2:1", [(1, 1), (2, 1)]),
        ("0,3:2", [(0, 2), (3, 2)]),
        ("*:1", [(0, 1), (1, 1), (2, 1), (3, 1)]),
        ("1:0; 2-3:1", [(1, 0), (2, 1), (3, 1)]),
        ("1:0;1:2", [(1, 0), (1, 2)]),
        (" 1 : 0 , 2 ; 3 : 1 ;", [(1, 0), (1, 2), (3, 1)]),
        ({1: [0, 2]}, [(1, 0), (1, 2)]),
        ({1: (0,), 3: range(1, 3)}, [(1, 0), (3, 1), (3, 2)]),
        ({1: "*", 2: "0,2"}, [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2)]),
        ({1: 2}, [(1, 2)]),
        ({"1-2": [0]}, [(1, 0), (2, 0)]),
        ({}, []),
    ],
    ids=str,
)
def test_a_spelling(spec: heads.HeadSpec, cells: list[tuple[int, int]]) -> None:
    found = heads.parse(spec, *SHAPE)
    assert found.dtype == torch.bool
    assert torch.equal(found, on(*cells))


def test_a_table_is_taken_as_it_is_and_not_shared() -> None:
    given = on((1, 2))
    found = heads.parse(given, *SHAPE)
    given[0, 0] = True
    assert torch.equal(found, on((1, 2)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", 'heads: found an empty text, expected for example "12:0,3; 14-20:*"'),
        (" ; ", 'heads: found an empty text, expected for example "12:0,3; 14-20:*"'),
        ("4:0", "layer 4 is out of range: this model has 4 layers, 0 to 3"),
        ("1:3", "head 3 is out of range: this model has 3 heads, 0 to 2"),
        ("2-9:0", "layer 4 is out of range: this model has 4 layers, 0 to 3"),
        ({-1: [0]}, "layer -1 is out of range: this model has 4 layers, 0 to 3"),
        ({0: [0, -1]}, "head -1 is out of range: this model has 3 heads, 0 to 2"),
        ({1: []}, "no head given: expected at least one of 0 to 2"),
        ("3-1:0", "no layer given: expected at least one of 0 to 3"),
        ("x:0", 'layer: found \'x\', expected a number, a range "4-7" or "*"'),
        ("1:", 'head: found \'\', expected a number, a range "4-7" or "*"'),
        (":1", 'layer: found \'\', expected a number, a range "4-7" or "*"'),
        ("1:0,,2", 'head: found \'\', expected a number, a range "4-7" or "*"'),
        ("1:-2", 'head: found \'-2\', expected a number, a range "4-7" or "*"'),
        ("1:2-", 'head: found \'2-\', expected a number, a range "4-7" or "*"'),
        ("1:*-2", 'head: found \'*-2\', expected a number, a range "4-7" or "*"'),
        ("1:0:2", 'head: found \'0:2\', expected a number, a range "4-7" or "*"'),
        ("1.5", 'layer: found \'1.5\', expected a number, a range "4-7" or "*"'),
        ({1: [0.5]}, "head: found 0.5, expected integers"),
        ({1: [True]}, "head: found True, expected integers"),
        (
            3,
            'heads: found 3, expected "all", a bool table, a mapping {layer: heads} or text '
            'such as "12:0,3; 14-20:*"',
        ),
        (
            torch.ones(SHAPE),
            "head table: found torch.float32 of shape (4, 3), "
            "expected torch.bool of shape (4, 3) for this model",
        ),
        (
            torch.ones(3, 4, dtype=torch.bool),
            "head table: found torch.bool of shape (3, 4), "
            "expected torch.bool of shape (4, 3) for this model",
        ),
    ],
    ids=str,
)
def test_a_wrong_spelling_says_what_is_wrong(spec: heads.HeadSpec, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        heads.parse(spec, *SHAPE)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (3, [3]),
        ([3, 0, 3], [0, 3]),
        (range(1, 3), [1, 2]),
        ("2-3,0", [0, 2, 3]),
        ("*", [0, 1, 2, 3]),
        ("1-1", [1]),
        pytest.param((number for number in (2, 1)), [1, 2], id="a generator"),
        ({2, 1}, [1, 2]),
        ([np.int64(2)], [2]),
        (np.int64(2), [2]),
    ],
    ids=str,
)
def test_numbers(spec: heads.LayerSpec, expected: list[int]) -> None:
    found = heads.numbers(spec, 4, "layer")
    assert found == expected
    assert all(type(number) is int for number in found)


@pytest.mark.parametrize("spec", [1.5, None, True, [None], ["1"]], ids=str)
def test_numbers_that_are_none(spec: object) -> None:
    wrong = spec[0] if isinstance(spec, list) else spec
    message = f"layer: found {wrong!r}, expected integers"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        heads.numbers(spec, 4, "layer")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], "none"),
        ([3], "3"),
        ([1, 2], "1-2"),
        ([1, 18, 19, 20], "1, 18-20"),
        ([4, 0, 2], "0, 2, 4"),
        (list(range(32)), "0-31"),
    ],
)
def test_text(layers: list[int], expected: str) -> None:
    assert heads.text(layers) == expected


@pytest.mark.parametrize("layers", [[0], [0, 1, 3], [1, 2, 3]])
def test_text_can_be_read_back(layers: list[int]) -> None:
    assert heads.numbers(heads.text(layers), 4, "layer") == layers


def test_by_method_one_spelling_for_all_or_one_each() -> None:
    names = ["var", "vhr"]
    assert heads.by_method(None, names) == {"var": None, "vhr": None}
    assert heads.by_method("1:0", names) == {"var": "1:0", "vhr": "1:0"}
    assert heads.by_method({2: [0]}, names) == {"var": {2: [0]}, "vhr": {2: [0]}}
    assert heads.by_method({"vhr": "1:0"}, names) == {"var": None, "vhr": "1:0"}
    message = "heads: found 'gift', expected methods of this patch: ['var', 'vhr']"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        heads.by_method({"gift": "1:0"}, names)


# ---- the live tables of a patch


def test_a_cell_a_slice_and_a_layer_are_switched_in_place() -> None:
    _, patch = wrapped()
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[3] = False  # VAR leaves the last layer alone
    assert torch.equal(patch.heads["var"], expected)
    patch.heads["var"][1, 3] = False
    expected[1, 3] = False
    patch.heads["var"][:, 0] = False
    expected[:, 0] = False
    patch.heads["var"][2] = False
    expected[2] = False
    assert torch.equal(patch.heads["var"], expected)
    assert patch.heads["vhr"].nonzero().tolist() == [[x, y] for x in (1, 2) for y in range(4)]


def test_a_table_takes_every_spelling_by_assignment() -> None:
    _, patch = wrapped()
    patch.heads["var"] = "2:0"
    assert patch.heads["var"].nonzero().tolist() == [[2, 0]]
    patch.heads["var"] = {1: [3]}
    assert patch.heads["var"].nonzero().tolist() == [[1, 3]]
    patch.heads["var"] = torch.eye(4, dtype=torch.bool)
    assert patch.heads["var"].nonzero().tolist() == [[x, x] for x in range(4)]
    patch.heads["var"] = "all"
    assert patch.heads["var"].all()
    patch.heads["var"] &= torch.eye(4, dtype=torch.bool)
    assert int(patch.heads["var"].sum()) == 4


def test_a_wrong_assignment_changes_nothing() -> None:
    _, patch = wrapped()
    before = patch.heads["var"].clone()
    for wrong in ("9:0", "2:9", torch.ones(4, 4), 7):
        with pytest.raises(ValueError, match=r"found|out of range"):
            patch.heads["var"] = wrong  # type: ignore[assignment]
    assert torch.equal(patch.heads["var"], before)


def test_an_unknown_name_is_refused_on_reading_and_writing() -> None:
    _, patch = wrapped()
    message = "no method 'vra' on this patch, only ['var', 'vhr']"
    with pytest.raises(KeyError) as error:
        patch.heads["vra"]
    assert error.value.args == (message,)
    with pytest.raises(KeyError) as error:
        patch.heads["vra"] = "all"
    assert error.value.args == (message,)
    assert list(patch.heads) == ["var", "vhr"]


def test_no_way_around_the_check_stands_open() -> None:
    """A name, once on the patch, stays; nothing stores a spelling that was not read."""
    _, patch = wrapped()
    with pytest.raises((TypeError, AttributeError)):
        del patch.heads["var"]  # type: ignore[attr-defined]
    for name in ("update", "pop", "clear", "setdefault", "popitem"):
        assert not hasattr(patch.heads, name)
    assert list(patch.heads) == ["var", "vhr"]
    assert len(patch.heads) == 2


def test_switches_count_inside_inference_mode() -> None:
    """Tables made there would not say that they were written."""
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.ONE_IMAGE)
    with torch.inference_mode():
        stock = model(**batch).logits
        with wrap(model, VHR()) as patch:
            patched = model(**batch).logits
            patch.heads["vhr"][:] = False
            off = model(**batch).logits
            patch.heads["vhr"] = "all"
            patch.heads["vhr"][1:] = False
            patch.heads["vhr"][0] = False
            assert torch.equal(model(**batch).logits, stock)
    assert not torch.equal(patched, stock)
    assert torch.equal(off, stock)
