"""Methods by name and by import path: what is found, and what is said where nothing is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vlm_patch
from eval.errors import EvalError
from eval.runs.config import from_settings
from eval.speed.measure import compared_sides
from eval.support import tiny
from vlm_patch import ForwardContext, Method, wrap
from vlm_patch.integrations.lmms_eval.arguments import build_methods
from vlm_patch.methods.registry import METHODS, find

PATH = f"{__name__}:Fade"
WORDS = "expected 'my_package.my_file:MyMethod', of a module that Python finds, such as a file in "


@dataclass(frozen=True)
class Fade(Method):
    """Attention before the softmax times `factor`, in the last row."""

    name: ClassVar[str] = "fade"
    factor: float = 0.5

    def edited_rows(self, forward: ForwardContext) -> Tensor:
        return forward.last

    def edit_scores(self, layer: int, scores: Tensor, *rest: Any) -> Tensor:
        return scores * self.factor


@dataclass(frozen=True)
class Nameless(Method):
    pass


class Loose(Method):
    name = "loose"


def test_the_library_s_own_have_one_line_each() -> None:
    folder = Path(vlm_patch.__file__).parent / "methods"
    papers = {path.stem for path in folder.glob("*.py")} - {"__init__", "registry"}
    assert set(METHODS) == papers
    assert {kind.__name__ for kind in METHODS.values()} <= {*vlm_patch.__all__}


def test_by_import_path() -> None:
    assert find(PATH) is Fade
    model = tiny.llava()
    batch = tiny.inputs(model, tiny.BATCH_OF_3)
    with torch.no_grad():
        with wrap(model, Fade(), layers=[1]):
            expected = model(**batch).logits
        with wrap(model, PATH, layers=[1]) as patch:
            assert torch.equal(model(**batch).logits, expected)
            assert "Fade(factor=0.5)" in patch.describe()
            patch.heads["fade"][:] = False
            stock = model(**batch).logits
        assert torch.equal(model(**batch).logits, stock)
    assert not torch.equal(expected[:, -1], stock[:, -1])


def test_in_settings_and_arguments() -> None:
    settings = from_settings({"methods": [PATH, "var"], "fade": {"factor": 2}})
    assert settings.build_methods() == [Fade(2.0), METHODS["var"]()]
    assert from_settings(settings.settings()) == settings
    assert build_methods(f"{PATH}+var", {"fade.factor": 3.0})[0] == Fade(3.0)


def test_speed_knows_no_release_of_a_method_of_one_s_own() -> None:
    assert ("release", PATH) not in compared_sides("decode", 1, ["var", PATH], 4)
    assert ("ours", PATH) in compared_sides("decode", 1, ["var", PATH], 4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere.at_all:X", f"cannot import 'nowhere.at_all' .*{WORDS}"),
        (f"{__name__}:Fad", r"not there; .* defines the methods \['Fade', .*did you mean 'Fade'"),
        (f"{__name__}:WORDS", "is no subclass of vlm_patch.Method"),
        (f"{__name__}:Nameless", "found name = None, expected a word for configs"),
        (f"{__name__}:Loose", "is no dataclass: write @dataclass"),
        ("gfit", "did you mean 'gift'"),
    ],
)
def test_what_is_no_method(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        wrap(tiny.llava(), name)
    if ":" in name:
        with pytest.raises(EvalError, match=f"methods: .*{text}"):
            from_settings({"methods": [name]})


def test_a_key_that_a_method_of_one_s_own_lacks() -> None:
    with pytest.raises(EvalError, match="unknown key in section fade: fctor; did you mean factor"):
        from_settings({"methods": [PATH], "fade": {"fctor": 2}})
    with pytest.raises(EvalError, match="unknown setting: fade"):
        from_settings({"methods": ["var"], "fade": {"factor": 2}})
