"""AMBER: which nouns count, what they cover, and the questions."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nltk
import pytest

from eval.benchmarks import wordnet
from eval.benchmarks.amber import Item, judge, score
from eval.benchmarks.amber.files import read_items, score_files
from eval.benchmarks.amber.nouns import (
    Lexicon,
    approximate,
    lemma,
    official,
    read_lexicon,
    similarity,
    spacy_similarity,
)
from eval.benchmarks.english import cased_tokens
from eval.errors import EvalError
from tests.support.shared_data import SHARED, shared

AMBER = SHARED / "amber"
LLAVA, INSTRUCTBLIP = "responses_llava-v1.5-7b_first166.json", "responses_instructblip-7b_all.json"

LEXICON = Lexicon(
    {
        "forest": ["tree", "wood"],
        "tree": ["plant"],
        "dog": [],
        "cat": ["kitten"],
        "sky": [],
        "can": [],
        "hot": [],
        "tomato": [],
        "line": [],
    },
    frozenset({"line"}),
)


def counts(nouns: str, item: Item, **more: Any) -> tuple[int, int, int, int]:
    """(nouns, hallucinated, truth words covered, hallu words marked)."""
    judged = judge(nouns.split(), item, LEXICON, **{"similar": str.__eq__, **more})
    assert judged.descriptions_hallucinated == (judged.nouns_hallucinated > 0)
    assert (judged.truth_words, judged.hallu_words) == (len(item.truth), len(item.hallu))
    return (
        judged.nouns,
        judged.nouns_hallucinated,
        judged.truth_words_covered,
        judged.hallu_words_covered,
    )


WOODS = Item("generative", ["forest", "tree", "dog", "dog"], ["cat", "dog", "sky"])


@pytest.mark.parametrize(
    ("nouns", "expected"),
    [
        ("", (0, 0, 0, 0)),
        ("sky sky", (2, 2, 0, 1)),
        ("tree", (1, 0, 1, 0)),  # covers forest, whose association comes before the tree
        ("tree plant", (2, 0, 2, 0)),
        ("dog dog", (2, 0, 1, 0)),  # a word that is annotated twice is covered once
        ("kitten cat", (2, 2, 0, 1)),
        ("line", (1, 0, 0, 0)),  # never held against, but counted
        ("tomato", (1, 1, 0, 0)),  # in neither list
    ],
)
def test_one_description(nouns: str, expected: tuple[int, int, int, int]) -> None:
    assert counts(nouns, WOODS) == expected


def test_a_similar_word_covers_and_can_be_marked_at_once() -> None:
    def similar(one: str, other: str) -> bool:
        return one == other or {one, other} in ({"tomato", "dog"}, {"tomato", "sky"})

    assert counts("tomato", WOODS, similar=similar) == (1, 0, 1, 1)
    only_imagined = Item("generative", ["tree"], ["sky"])
    assert counts("tomato", only_imagined, similar=similar) == (1, 1, 0, 1)


def test_approximate_nouns() -> None:
    text = "A hot dog can see two trees. A can of tomatoes; Dogs, kittens."
    assert approximate(text, LEXICON) == ["dog", "tree", "can", "tomato", "kitten"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("glasses", "glass"),
        ("leaves", "leaf"),
        ("children", "child"),
        ("men", "men"),
        ("earrings", "earring"),
        ("benches", "bench"),
        ("berries", "berry"),
        ("unknowns", "unknowns"),
    ],
)
def test_lemmas(word: str, expected: str) -> None:
    known = ["glass", "glasses", "leave", "leaf", "child", "man", "earrings", "bench", "berry"]
    assert lemma(word, frozenset(known)) == expected


def item(kind: str, answer: str) -> Item:
    return Item(kind, (), answer=answer)


def test_questions() -> None:
    items = {
        1: item("discriminative-attribute-state", "no"),
        2: item("discriminative-attribute-state", "no"),
        3: item("discriminative-attribute-action", "yes"),
        4: item("relation", "no"),
        5: item("discriminative-relation", "yes"),
        6: item("discriminative-hallucination", "no"),
    }
    given = [(1, "No"), (2, "Yes"), (3, "No"), (4, "No."), (5, "Yes"), (6, "No")]
    result = score(given, items, LEXICON)
    everything = result["discriminative"]["all"]
    assert everything["counts"] == {
        "asked": 6,
        "right": 3,
        "right_no": 2,
        "said_no": 3,
        "labelled_no": 4,
        "unreadable": 1,
    }
    assert everything["accuracy"] == 0.5
    assert (everything["precision"], everything["recall"]) == (2 / 3, 0.5)
    assert everything["f1"] == 4 / 7
    assert everything["unreadable"] == 1 / 6
    parts = ["all", "existence", "attribute", "state", "action", "relation"]
    assert list(result["discriminative"]) == parts
    assert result["discriminative"]["attribute"]["counts"]["asked"] == 3
    assert result["discriminative"]["relation"]["accuracy"] == 0.5
    # from precision and recall as rounded: 2 * .667 * .5 / (.667 + .5 + .0001)
    assert result["official"]["discriminative"]["F1"] == 57.2
    assert result["official"]["relation"]["F1"] == 0.0
    assert "generative" not in result
    assert "overall" not in result


def test_questions_about_one_image_are_drawn_together() -> None:
    """Two images, the ten questions about one right and about the other wrong: all or nothing."""
    items = {n: Item("relation", (), answer="no", image="ab"[n // 10]) for n in range(20)}
    given = [(n, "No" if n < 10 else "Yes") for n in range(20)]
    together = score(given, items, LEXICON)["discriminative"]["all"]
    assert together["intervals"]["accuracy"] == [0.0, 1.0]
    assert (together["accuracy"], together["n"], together["counts"]["asked"]) == (0.5, 20, 20)
    unknown = {n: item("relation", "no") for n in range(20)}
    low, high = score(given, unknown, LEXICON)["discriminative"]["all"]["intervals"]["accuracy"]
    assert 0.2 < low < high < 0.8


def test_the_amber_score_draws_what_is_said_of_an_image_together() -> None:
    """Of every image the description and the answer are both right, or both wrong."""
    items = {
        n: Item("generative", ["dog"], ["cat"], image=f"{n}")
        if n < 20
        else Item("relation", (), answer="no", image=f"{n - 20}")
        for n in range(40)
    }
    given = [(n, ("A dog.", "A cat.", "No", "Yes")[2 * (n // 20) + n % 2]) for n in range(40)]
    found = score(given, items, LEXICON, nouns="approximate")["overall"]
    assert found["n"] == 20
    assert found["amber_score"] == pytest.approx((1 - 0.5 + 2 / 3) / 2)
    # with k of 20 images right the score is (1 - (20 - k) / 20 + 2 k / (k + 20)) / 2
    drawn = {round((k / 20 + 2 * k / (k + 20)) / 2, 9) for k in range(21)}
    assert {round(bound, 9) for bound in found["intervals"]["amber_score"]} <= drawn


def test_descriptions_and_questions_give_the_amber_score() -> None:
    items = {1: Item("generative", ["dog", "sky"], ["cat"]), 2: item("relation", "no")}
    result = score([(1, "A dog and a cat."), (2, "No")], items, LEXICON, nouns="approximate")
    generative = result["generative"]
    assert (generative["chair"], generative["cover"]) == (0.5, 0.5)
    assert (generative["hal"], generative["cog"]) == (1.0, 1.0)
    assert generative["mean_words"] == 5
    assert (generative["nouns"], generative["similarity"]) == ("approximate", "exact")
    assert result["overall"]["amber_score"] == (1 - 0.5 + 1.0) / 2
    assert result["overall"]["n"] == 2
    assert result["official"]["generative"] == {
        "CHAIR": 50.0,
        "Cover": 50.0,
        "Hal": 100.0,
        "Cog": 99.9,  # 1 of 1.001
    }


def test_official_nouns_to_the_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All but NLTK's tagger and lemmatiser: what it is asked, what is kept, and how it counts."""
    asked: list[list[str]] = []

    def tag(tokens: Sequence[str]) -> list[tuple[str, str]]:
        asked.append([*tokens])
        kinds = {"can": "MD", "see": "VB", "Dogs": "NNS", "Rex": "NNP", "trees": "NNS"}
        nouns = dict.fromkeys(("tree", "kitten", "line", "tomato", "boat"), "NN")
        return [(word, {**kinds, **nouns}.get(word, "DT")) for word in tokens]

    def lemma(word: str, part: str) -> str:
        assert part == "n"
        return {"trees": "tree"}.get(word, word)  # WordNet knows no capitals: "Dogs" stays

    monkeypatch.setattr(wordnet, "nltk_tools", lambda: wordnet.Tools(cased_tokens, tag, lemma))
    files = {
        "annotations.json": [
            {"id": 1, "type": "generative", "truth": ["forest", "dog"], "hallu": ["cat", "sky"]},
            {"id": 2, "type": "generative", "truth": ["sky"], "hallu": ["tomato"]},
        ],
        "relation.json": LEXICON.associations,
        "responses.json": [
            {"id": 1, "response": "Dogs can see trees. Rex's kitten sat at a line, on a boat."},
            {"id": 2, "response": "No tomato."},
        ],
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "safe_words.txt").write_text("line")
    result = score_files(tmp_path / "responses.json", tmp_path)
    words = "Dogs can see trees . Rex 's kitten sat at a line , on a boat ."
    assert asked[0] == words.split(" ")
    generative = result["generative"]
    assert generative["counts"] == {
        "descriptions": 2,
        "descriptions_hallucinated": 2,
        "nouns": 4,  # tree, kitten, line; tomato. "boat" and "Dogs" are no words of the benchmark
        "nouns_hallucinated": 2,
        "truth_words": 3,
        "truth_words_covered": 1,  # the tree belongs to the forest
        "hallu_words": 3,
        "hallu_words_covered": 2,  # the kitten to the cat
        "words": 13 + 2,
    }
    assert generative["nouns"] == "nltk"
    assert result["official"]["generative"] == {
        "CHAIR": 50.0,
        "Cover": 33.3,
        "Hal": 100.0,
        "Cog": 66.6,  # 2 of 3.001
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no responses"),
        ([(7, "No")], "id 7 is not in the annotations"),
        ([(1, "No"), (1, "Yes")], "id 1 has more than one response"),
    ],
)
def test_bad_responses(given: list[tuple[int, str]], message: str) -> None:
    with pytest.raises(EvalError, match=message):
        score(given, {1: item("relation", "no")}, LEXICON)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"type": "relation", "truth": "no"}, "entry 1: no field 'id'"),
        ({"id": "x", "type": "relation", "truth": "no"}, "field 'id' is 'x'; expected an integer"),
        ({"id": 1, "type": "poem", "truth": "no"}, "entry 1: type 'poem'; expected one of discr"),
        ({"id": 1, "type": "relation", "truth": "maybe"}, "'truth' is 'maybe'; expected 'yes'"),
        ({"id": 1, "type": "generative", "truth": "sky"}, "'truth' is 'sky'; expected strings"),
        ({"id": 1, "type": "generative", "truth": ["sky"]}, "entry 1: no field 'hallu'"),
    ],
)
def test_a_bad_annotation_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(EvalError, match=rf"annotations\.json, {message}|{message}"):
        read_items(path)


def test_a_response_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "annotations.json").write_text('[{"id": 1, "type": "relation", "truth": "no"}]')
    (tmp_path / "r.json").write_text('[{"id": 1, "response": "No"}, {"id": 2, "response": "No"}]')
    with pytest.raises(EvalError, match=r"r\.json, entry 2: id 2 is not in .*annotations\.json"):
        score_files(tmp_path / "r.json", tmp_path)


def test_a_broken_lexicon_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"relation\.json: no such file"):
        read_lexicon(tmp_path)
    (tmp_path / "relation.json").write_text('{"sky": "blue"}')
    with pytest.raises(EvalError, match=r"relation\.json, word 'sky': expected a list"):
        read_lexicon(tmp_path)


class Document:
    def __init__(self, text: str) -> None:
        self.angle = {"dog": 1.0, "puppy": 0.9, "car": 0.1}[text]

    def similarity(self, other: "Document") -> float:
        return self.angle * other.angle


def test_word_vectors_above_0_8() -> None:
    similar = spacy_similarity(Document)
    assert similar("dog", "puppy")
    assert similar("car", "car")
    assert not similar("dog", "car")


def test_missing_spacy_and_missing_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(EvalError, match=r'need spaCy, .*pip install -e "\.\[spacy\]"'):
        similarity("spacy")

    def load(name: str) -> None:
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(EvalError, match=r"spaCy has no model en_core_web_lg: .*spacy download"):
        similarity("spacy")


def reference(name: str) -> dict[str, Any]:
    scores = json.loads((SHARED / "reference_scores.json").read_text())["amber"]
    return scores[name]  # type: ignore[no-any-return]


@shared
def test_every_question_of_the_published_run() -> None:
    expected = reference(INSTRUCTBLIP)
    result = score_files(AMBER / INSTRUCTBLIP, AMBER, "approximate")
    printed = {k: v for k, v in result["official"].items() if k != "generative"}
    assert printed == {k: v for k, v in expected["official_output"].items() if k != "generative"}
    prefixes = {"all": "", "existence": "ha_", "state": "as_", "number": "an_", "action": "aa_"}
    names = {
        "right": "qa_correct_score",
        "asked": "qa_correct_num",
        "right_no": "qa_no_score",
        "labelled_no": "qa_no_num",
        "said_no": "qa_ans_no_num",
    }
    for part, prefix in {**prefixes, "relation": "asso_"}.items():
        counted = result["discriminative"][part]["counts"]
        for ours, theirs in names.items():
            assert counted[ours] == expected["counts"][prefix + theirs], (part, ours)


@pytest.mark.parametrize("name", [LLAVA, INSTRUCTBLIP])
@shared
def test_approximate_nouns_stay_close_to_the_published_scores(name: str) -> None:
    result = score_files(AMBER / name, AMBER, "approximate")["official"]["generative"]
    for measure, value in reference(name)["official_output"]["generative"].items():
        assert abs(result[measure] - value) < 0.75


def test_where_nltk_finds_none_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    wordnet.nltk_tools.cache_clear()
    with pytest.raises(EvalError, match=r"python -m nltk\.downloader.*nouns approximate"):
        official("A dog.", LEXICON)


@pytest.mark.parametrize("name", [LLAVA, INSTRUCTBLIP])
@shared
def test_the_published_descriptions(nltk_data: Path, name: str) -> None:
    expected, result = reference(name), score_files(AMBER / name, AMBER)
    assert result["official"] == expected["official_output"]
    counted, theirs = result["generative"]["counts"], expected["counts"]
    names = {
        "nouns": "chair_num",
        "nouns_hallucinated": "chair_score",
        "truth_words": "safe_cover_num",
        "truth_words_covered": "safe_cover_score",
        "hallu_words": "hallu_cover_num",
        "hallu_words_covered": "hallu_cover_score",
        "descriptions": "non_hallu_num",
    }
    assert {our: counted[our] for our in names} == {our: theirs[t] for our, t in names.items()}
    clean = counted["descriptions"] - counted["descriptions_hallucinated"]
    assert clean == theirs["non_hallu_score"]
