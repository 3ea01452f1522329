"""Reading free answers as yes or no."""

import pytest

from eval.benchmarks.parsers import PARSERS, parser_named, readable, says_no
from eval.errors import EvalError


@pytest.mark.parametrize(
    ("answer", "no", "read"),
    [
        ("Yes", False, True),
        ("No", True, True),
        ("No.", True, True),
        ("no, there is none", True, True),
        ("Yes, there is no doubt.", True, True),
        ("There is a car. No dog.", False, True),
        ("There is not a car", True, False),
        ("There is no car in the image.", True, True),
        ("Yes, it is a snowboard.", False, True),
        # what the official parser takes for a yes
        ("NO", False, True),
        ("no!", False, True),
        ('"No"', False, True),
        ("No\nThere is none", False, True),
        ("There isn't a car", False, False),
        ("I cannot see a car", False, False),
        ("", False, False),
        ("Maybe", False, False),
        ("The image shows a car", False, False),
        ("None", False, False),
        ("yesno", False, False),
        ("It could be yes or no", True, False),
    ],
)
def test_parsers(answer: str, no: bool, read: bool) -> None:
    assert says_no(answer) is no
    assert readable(answer) is read


# answer, then what each parser reads: evaluators of POPE that are in use, side by side
ORDER = ("official", "opera", "lmms_eval", "vlmevalkit", "first_word", "strict")


@pytest.mark.parametrize(
    ("answer", "readings"),
    [
        ("Yes", "yes yes yes yes yes yes"),
        ("No", "no no no no no no"),
        ("No.", "no no - no no no"),
        ("NO", "yes no no no no no"),
        ("Yes, there is no doubt.", "no no - - yes yes"),
        ("There is a car. No dog.", "yes no - no - no"),
        ("There isn't a car", "yes no - - - -"),
        ("I cannot see a car", "yes yes - - - -"),
        ("Yes, it is a snowboard.", "yes yes - yes yes yes"),
        ('"No"', "yes yes - no no no"),
        ("no!", "yes yes - no no no"),
        ("No\nThere is none", "yes yes - no no no"),
        ("", "yes yes - - - -"),
        ("Maybe", "yes yes - - - -"),
        ("The image shows a car", "yes yes - - - -"),
        ("None", "yes yes - - - -"),
        ("Nope", "yes yes - - - -"),
    ],
)
def test_the_parsers_side_by_side(answer: str, readings: str) -> None:
    assert " ".join(PARSERS[name](answer) or "-" for name in ORDER) == readings


def test_an_unknown_parser_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EvalError, match=r"parser 'vcd': expected one of official, strict, first_"):
        parser_named("vcd")
