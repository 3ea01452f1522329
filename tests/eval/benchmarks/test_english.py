"""Sentences, Treebank tokens and the singular forms of the `pattern` rules."""

import json

import pytest

from eval.benchmarks.english import sentences, singular, tokens
from tests.support.shared_data import SHARED, shared

CHAIR = SHARED / "chair"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # regular and irregular nouns
        *[("dogs", "dog"), ("women", "woman"), ("children", "child"), ("people", "person")],
        *[("knives", "knife"), ("leaves", "leaf"), ("calves", "calf"), ("mice", "mouse")],
        *[("benches", "bench"), ("ponies", "pony"), ("buses", "bus"), ("shoes", "shoe")],
        *[("skis", "ski"), ("sandwiches", "sandwich"), ("potatoes", "potato")],
        # the oddities that published scores rest on
        *[("bus", "bu"), ("ties", "ty"), ("glass", "glas"), ("glasses", "glass")],
        *[("tennis", "tenni"), ("police", "polouse"), ("has", "ha"), ("four", "fmy")],
        *[("shelves", "shelve"), ("minibus", "minibu"), ("airbus", "airbu")],
        # kept: listed nouns, what listed nouns end with, plurals of words in -ie
        *[("scissors", "scissors"), ("luggage", "luggage"), ("is", "is"), ("out", "out")],
        *[("s", "s"), ("doggies", "doggies"), ("collies", "collies"), ("", "")],
        # hyphens and apostrophes
        *[("mothers-in-law", "mother-in-law"), ("teddy-bears", "teddy-bear")],
        *[("boys'", "boy's"), ("'s", "'"), ("'", "'s")],
    ],
)
def test_singular(word: str, expected: str) -> None:
    assert singular(word) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat. A dog!", ["a", "cat", ".", "a", "dog", "!"]),
        ("It's a man's tie.", ["it", "'s", "a", "man", "'s", "tie", "."]),
        ("the boys' kites", ["the", "boys", "'", "kites"]),
        ("They can't, we'll go", ["they", "ca", "n't", ",", "we", "'ll", "go"]),
        ("cannot gonna", ["can", "not", "gon", "na"]),
        ("at 3:30, or 1,000", ["at", "3:30", ",", "or", "1,000"]),
        ("a well-known (red) car--fast", ["a", "well-known", "(", "red", ")", "car", "--", "fast"]),
        ('He says "stop." Then', ["he", "says", '"', "stop", ".", '"', "then"]),
        ("(a table.) A chair", ["(", "a", "table", ".", ")", "a", "chair"]),
        ("wait... what", ["wait", "...", "what"]),
        ("a table.A chair", ["a", "table.a", "chair"]),
        ("", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a cat. a dog? yes! ok", ["a cat.", "a dog?", "yes!", "ok"]),
        ('it says "stop." the end', ['it says "stop."', "the end"]),
        # numbers, initials and abbreviations go on when a word follows
        ("on us highway 395. the sign", ["on us highway 395. the sign"]),
        ("the u.s. navy at 5:45. there", ["the u.s. navy at 5:45. there"]),
        ("a sign for st. robson street", ["a sign for st. robson street"]),
        ("there are 20. 3 are red", ["there are 20.", "3 are red"]),
        ("a process.; furthermore", ["a process.", "; furthermore"]),
    ],
)
def test_sentences(text: str, pieces: list[str]) -> None:
    assert sentences(text) == pieces


@shared
def test_singular_agrees_with_the_original_on_every_shared_pair() -> None:
    pairs = json.loads((CHAIR / "singularize_pairs.json").read_text())
    assert len(pairs) == 7937
    assert {word: singular(word) for word in pairs} == pairs


@shared
def test_tokens_agree_with_the_published_example() -> None:
    for sentence in json.loads((CHAIR / "example_outputs.json").read_text())["sentences"]:
        assert [singular(token) for token in tokens(sentence["caption"])] == sentence["words"]
