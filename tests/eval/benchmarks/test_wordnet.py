"""The `wordnet` rules: with NLTK's data exactly the published column, without it a clear word.

NLTK's data is no part of the repository (docs/verification.md). Without it, everything but the
tagger and the lemmatiser is tested with two stand-ins for them, which hold what they say of the
golden captions.
"""

import builtins
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nltk
import pytest

from eval.benchmarks import english, wordnet
from eval.benchmarks.chair import judge, score
from eval.benchmarks.chair.files import score_files as score_chair
from eval.benchmarks.coco import Vocabulary, read_truth
from eval.errors import EvalError
from tests.eval.benchmarks.test_chair import CAPTION_FILES, CHAIR
from tests.support.shared_data import SHARED, shared

# caption, objects: what OPERA's fork of the script gives
GOLDEN = [
    ("A bus and two buses.", "bus, bus"),
    ("The toilet seat is up.", "toilet"),
    ("The seat of the toilet is up.", "toilet"),
    ("A man on a seat next to a toilet and a chair.", "person, toilet, chair"),
    ("Two hot dogs on plates.", "hot dog"),
    ("A dog eats a hot dog.", "dog, hot dog"),
    ("a baby elephant with its mother", "elephant, person"),
    ("A passenger train passes passengers.", "train, person"),
    ("The train tracks cross home plate.", ""),
    ("A motor bike and motor cycles.", "motorcycle"),
    ("a stove top oven", "oven, oven"),
    ("two wine glasses and a wine glass", "wine glass, wine glass"),
    ("Men and women wear ties and a bow tie.", "person, tie, tie"),
    ("People are seated; a man is skiing.", "person, chair, person, skis"),
    ("a man's tie and the boys' kites", "person, tie, person, kite"),
    ("cell phones, mobile phone, iPhone", "cell phone, cell phone"),
    ("teddy bears and a teddy-bear", "teddy bear"),
    ("A cheesecake and cakes", "cake"),
    ("an orange car", "orange, car"),
    ("potted plants and a plant", ""),
    ("street lights, parking meters", "traffic light"),
    ("a mother bird feeding", "person, bird"),
    ("firetrucks and fire trucks", "truck"),
    ("", ""),
]
# words that are tagged as something else than a noun there, the mistakes included
TAGS = dict.fromkeys(["seated", "potted"], "VBN") | dict.fromkeys(["passes", "meters"], "VBZ")
TAGS |= {"skiing": "VBG", "feeding": "VBG", "eats": "VBZ", "is": "VBZ", "are": "VBP"}
VERBS = {"seated": "seat", "potted": "pot", "skiing": "ski", "passes": "pass", "feeding": "feed"}
NOUNS = {"buses": "bus", "glasses": "glass", "women": "woman"}
PLURALS = (
    "bears boys cakes cycles dogs kites lights passengers phones plants plates ties tracks trucks"
)
NOUNS |= {word: word[:-1] for word in PLURALS.split()}


def tag(tokens: Sequence[str]) -> list[tuple[str, str]]:
    return [(word, TAGS.get(word, "NN")) for word in tokens]


def lemma(word: str, part: str) -> str:
    return (VERBS if part == "v" else NOUNS).get(word, word)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordnet, "nltk_tools", lambda: wordnet.Tools(english.tokens, tag, lemma))


@pytest.mark.parametrize(("caption", "expected"), GOLDEN)
@shared
def test_golden_examples(nltk_data: Path, caption: str, expected: str) -> None:
    standard = Vocabulary.load(CHAIR / "synonyms.txt", "wordnet")
    assert ", ".join(name for _, name in standard.mentions(caption)) == expected


@pytest.mark.parametrize(("caption", "expected"), GOLDEN)
@shared
def test_golden_examples_by_stand_ins(stand_in: None, caption: str, expected: str) -> None:
    standard = Vocabulary.load(CHAIR / "synonyms.txt", "wordnet")
    assert ", ".join(name for _, name in standard.mentions(caption)) == expected


def test_the_rules_read_captions_and_are_written_down(stand_in: None) -> None:
    by_rules = {
        rules: score([(1, "A bus.")], {1: ["bus"]}, Vocabulary.load(None, rules))
        for rules in ("pattern", "wordnet")
    }
    assert {rules: result["recall"] for rules, result in by_rules.items()} == {
        "pattern": 0.0,  # "bus" is read as "bu"
        "wordnet": 1.0,
    }
    assert [result["rules"] for result in by_rules.values()] == ["pattern", "wordnet"]


def test_nouns_are_what_is_tagged_as_nouns(stand_in: None) -> None:
    assert wordnet.nouns("men seated glasses is") == ["men", "glass"]
    assert wordnet.lemmas("men seated glasses") == ["men", "seat", "glass"]


def test_without_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith("nltk"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    wordnet.nltk_tools.cache_clear()
    with pytest.raises(EvalError, match=r'need NLTK.*pip install -e ".\[nltk\]"'):
        Vocabulary.load(None, "wordnet").read("A dog.")


def test_nltk_without_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, stem = ModuleType("nltk"), ModuleType("nltk.stem")

    def find(place: str) -> str:
        """As NLTK's own, which looks into wordnet.zip where the name ends in a slash."""
        if place.startswith("taggers") or place == "corpora/wordnet":
            raise LookupError(place)
        return place

    fake.data, stem.WordNetLemmatizer = ModuleType("nltk.data"), object  # type: ignore[attr-defined]
    fake.data.find = find
    for module in (fake, stem):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    wordnet.nltk_tools.cache_clear()
    with pytest.raises(EvalError) as caught:
        wordnet.lemmas("dog")
    assert "without its data averaged_perceptron_tagger_eng: python -m nltk.downloader" in str(
        caught.value
    )
    assert "and wordnet" not in str(caught.value)


def test_where_nltk_finds_none_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    wordnet.nltk_tools.cache_clear()
    with pytest.raises(EvalError, match=r"without its data punkt_tab and averaged.* and wordnet: "):
        Vocabulary.load(None, "wordnet").read("A dog.")


# one token of 142,854, by the version of the tokeniser; every mention is the same
TOKENS_MORE = {"pope-paper_llava_short.jsonl": 1}


@pytest.mark.parametrize("name", CAPTION_FILES)
@shared
def test_the_published_wordnet_column(nltk_data: Path, name: str) -> None:
    scores = json.loads((SHARED / "reference_scores.json").read_text())["chair"][name]["wordnet"]
    truth, synonyms = CHAIR / "objects_wordnet.json", CHAIR / "synonyms.txt"
    result = score_chair(CHAIR / "captions" / name, truth, synonyms, "wordnet")
    expected = scores["counts"]
    more = result["counts"].pop("tokens") - expected.pop("tokens")
    assert 0 <= more <= TOKENS_MORE.get(name, 0)
    assert {count: result["counts"][count] for count in expected} == expected


@shared
def test_every_caption_of_a_published_file(nltk_data: Path) -> None:
    standard = Vocabulary.load(CHAIR / "synonyms.txt", "wordnet")
    objects = read_truth(CHAIR / "objects_wordnet.json", standard)
    name = "opera_llava-1.5_greedy.jsonl"
    captions = (CHAIR / "captions" / name).read_text().splitlines()
    sentences = (CHAIR / f"sentences_wordnet_{name}").read_text().splitlines()
    for line, wanted in zip(captions, map(json.loads, sentences), strict=True):
        judged = judge(json.loads(line)["caption"], objects[wanted["image_id"]], standard)
        assert (judged.objects, judged.tokens) == (wanted["objects"], wanted["tokens"])
