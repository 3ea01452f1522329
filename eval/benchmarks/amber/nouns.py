"""The nouns that AMBER counts in a description, and when two of them mean the same.

Official is NLTK: its tagger says what is a noun, WordNet what it is the plural of. Without them
`approximate` takes every word of the benchmark's 418 for a noun, which counts a few more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from eval.benchmarks import wordnet
from eval.benchmarks.english import cased_tokens
from eval.benchmarks.rows import read_json, read_text
from eval.errors import EvalError

Nouns: TypeAlias = Literal["nltk", "approximate"]
Similarity: TypeAlias = Literal["exact", "spacy"]
LEXICON = ("relation.json", "safe_words.txt")
SPACY_MODEL = "en_core_web_lg"
# noun endings as WordNet takes them off; the shortest form that is a known word is the lemma
_ENDINGS = (
    *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch")),
    *(("shes", "sh"), ("ies", "y"), ("oes", "o")),
)
_IRREGULAR = {"children": "child", "geese": "goose", "knives": "knife", "leaves": "leaf"}
_IRREGULAR |= {"mice": "mouse"}
# WordNet has these plurals under a singular that the benchmark does not list
_PLURALS = ("chopsticks", "earrings", "slippers", "sunglasses")
_DETERMINERS = frozenset(("a", "an", "one", "the", "this", "that", "each", "every", "another"))


@dataclass(frozen=True)
class Lexicon:
    """The benchmark's words.

    associations: what each may also be called
    safe: words that never count as hallucinated
    """

    associations: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(self.associations).union(*self.associations.values())

    def chain(self, words: Sequence[str]) -> list[tuple[str, int]]:
        """(word, number of the annotated word behind it): associations first, then the words."""
        related = [
            (other, n) for n, word in enumerate(words) for other in self.associations.get(word, ())
        ]
        return [*related, *((word, n) for n, word in enumerate(words))]


Reader: TypeAlias = Callable[[str, Lexicon], list[str]]
Similar: TypeAlias = Callable[[str, str], bool]


def read_lexicon(folder: Path) -> Lexicon:
    """`relation.json` and `safe_words.txt` of the benchmark."""
    path = folder / "relation.json"
    related = read_json(path)
    if not isinstance(related, dict):
        raise EvalError(f"{path}: expected {{word: [associated words]}}.")
    for word, others in related.items():
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise EvalError(f"{path}, word {word!r}: expected a list of words.")
    return Lexicon(related, frozenset(read_text(folder / "safe_words.txt").split("\n")))


def official(text: str, lexicon: Lexicon) -> list[str]:
    """Lemmas of what NLTK tags as a noun, if the benchmark knows them."""
    require_nltk()
    return [word for word in wordnet.nouns(text) if word in lexicon.words]


def require_nltk() -> None:
    """`EvalError` with both cures where NLTK or its data is missing."""
    try:
        wordnet.nltk_tools()
    except EvalError as error:
        raise EvalError(f"{error} Without them: nouns approximate, a little off.") from None


def approximate(text: str, lexicon: Lexicon) -> list[str]:
    """Every word of the benchmark in the text, but for "hot" and for "can" where it is a verb."""
    tokens = cased_tokens(text)
    pairs = zip(["", *map(str.lower, tokens)], tokens, strict=False)
    read = ((before, word, lemma(word, lexicon.words)) for before, word in pairs)
    return [
        known
        for before, word, known in read
        if known in lexicon.words and word != "hot" and (word != "can" or before in _DETERMINERS)
    ]


def lemma(word: str, known: frozenset[str]) -> str:
    """Singular form among `known` words, as WordNet would give it; the word itself if none is."""
    if word in _PLURALS:
        return word[:-1]
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    cut = [word[: -len(old)] + new for old, new in _ENDINGS if word.endswith(old)]
    return min((form for form in (word, *cut) if form in known), key=len, default=word)


READERS: Mapping[str, Reader] = {"nltk": official, "approximate": approximate}


def reader(name: str) -> Reader:
    if name not in READERS:
        raise EvalError(f"nouns {name!r}: expected {' or '.join(READERS)}.")
    return READERS[name]


def similarity(name: str) -> Similar:
    """ "exact": the same word. "spacy": word vectors, as in the published script."""
    if name not in ("exact", "spacy"):
        raise EvalError(f"similarity {name!r}: expected exact or spacy.")
    return str.__eq__ if name == "exact" else spacy_similarity(_spacy_model())


def spacy_similarity(model: Any) -> Similar:
    """Cosine of two words above 0.8, by the vectors of a spaCy model."""
    document = lru_cache(maxsize=None)(model)

    def similar(one: str, other: str) -> bool:
        return one == other or bool(document(one).similarity(document(other)) > 0.8)

    return similar


def _spacy_model() -> Any:
    cure = (
        f'pip install -e ".[spacy]", then python -m spacy download {SPACY_MODEL}. '
        "Equality of strings (the default) gave the same published numbers."
    )
    try:
        import spacy
    except ImportError:
        raise EvalError(
            f"AMBER's word vectors need spaCy, which is not installed: {cure}"
        ) from None
    try:
        return spacy.load(SPACY_MODEL)
    except OSError:
        raise EvalError(f"spaCy has no model {SPACY_MODEL}: {cure}") from None
