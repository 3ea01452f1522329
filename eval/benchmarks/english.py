"""English words the way CHAIR's `pattern` rules see them: sentences, tokens, singular forms.

The published CHAIR numbers depend on the oddities of two tools: Treebank word tokens, and the
noun singulariser of the Python package `pattern` 3.6. Both are rebuilt here as ordered tables, with
no downloaded data and with the oddities kept: "bus" becomes "bu", "glass" becomes "glas", and a
word that a list word happens to end in ("s", "is", "out") stays as it is.
"""

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

_SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+ | (?<=[.!?])(?=[;:*@({])""", re.VERBOSE
)
# a period after one of these ends no sentence when a lower-case word follows
_ABBREVIATED = re.compile(
    r"""(?:^|[\s("':])(?:\d[\d,.-]*|(?:[a-z]\.)*[a-z]
        |ave|co|corp|dr|inc|jr|ltd|mr|mrs|ms|mt|prof|sr|st|vs)\.$""",
    re.VERBOSE,
)


def _rules(*pairs: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


# Both tables are applied in order to one lower-cased sentence; what is then left between blanks is
# a token. The second one looks for a blank on both sides.
_SPLITS = _rules(
    # opening quotes, and an apostrophe before a one-letter word that is no clitic
    (r"([«“‘„]|`+)", r" \1 "),
    (r'^"', '" '),
    (r"""([ (\[{<])("|'')""", r"\1 \2 "),
    (r"'(?!re|ve|ll|[mtsdn])(\w)\b", r"' \1"),
    # the final period, also before closing quotes and brackets
    (r"""([^.])\.([\])}>"'»”’ ]*)$""", r"\1 . \2"),
    (r"([:,])(\D)", r" \1 \2"),
    (r"([:,])$", r" \1 "),
    (r"(\.{2,})", r" \1 "),
    (r"([;@#$%&?!*])", r" \1 "),
    (r"([^'])' ", r"\1 ' "),
    (r"([\[\](){}<>])", r" \1 "),
    (r"--", r" -- "),
)
_CLOSINGS = _rules(
    (r"""([»”’"]|'')""", r" \1 "),
    # clitics and run-together words
    (r"([^' ])('[smd]|') ", r"\1 \2 "),
    (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    (r"\b(can)(?=not\b)|\b(gon|wan)(?=na\b)|\b(got)(?=ta\b)|\b(gim|lem)(?=me\b)", r"\1\2\3\4 "),
    (r" ('t)(is|was)\b", r" \1 \2 "),
)


def sentences(text: str) -> list[str]:
    """Pieces of a lower-cased text, cut at white space after `.`, `!`, `?` and one closing mark.

    Where a word follows, no cut comes after a number, an initial or an abbreviation ("u.s. navy"),
    as in NLTK's English model. It changes how many tokens a caption has, hardly ever its objects.
    """
    pieces, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        word_follows = text[end.end() : end.end() + 1].isalpha()
        if not (word_follows and _ABBREVIATED.search(text[start : end.start()])):
            pieces.append(text[start : end.start()])
            start = end.end()
    return [*pieces, text[start:]]


def tokens(text: str) -> list[str]:
    """Lower-cased Treebank tokens of a text, punctuation included, sentence by sentence."""
    return cased_tokens(text.lower())


def cased_tokens(text: str) -> list[str]:
    """Like `tokens`, with capitals as they are."""
    return [token for sentence in sentences(text.strip()) for token in _split(sentence)]


def _split(sentence: str) -> list[str]:
    for pattern, replacement in _SPLITS:
        sentence = pattern.sub(replacement, sentence)
    sentence = f" {sentence} "
    for pattern, replacement in _CLOSINGS:
        sentence = pattern.sub(replacement, sentence)
    return sentence.split()


@dataclass(frozen=True)
class _Lists:
    """The word lists of `vocabulary/pattern.yaml`, in the form that the rules ask for them."""

    prepositions: frozenset[str]
    kept: frozenset[str]
    ie_plurals: tuple[str, ...]
    irregular: dict[str, str]
    endings: list[tuple[re.Pattern[str], str]]


@cache
def _lists() -> _Lists:
    data = rule_data()
    return _Lists(
        prepositions=frozenset(data["prepositions"].split()),
        # every ending of a listed word counts: "s", "is" and "out" are left alone
        kept=frozenset(w[i:] for w in data["no_plural"].split() for i in range(len(w))),
        ie_plurals=tuple(word + "s" for word in data["ie"].split()),
        irregular=data["irregular"],
        endings=_rules(*data["plurals"].items()),
    )


@cache
def rule_data() -> dict[str, Any]:
    """The word lists of the `pattern` rules as they stand in `vocabulary/pattern.yaml`."""
    path = Path(__file__).parent / "vocabulary" / "pattern.yaml"
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return data


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """Singular form of a lower-cased noun, as `pattern` 3.6 gives it for any token at all."""
    lists = _lists()
    first, _, rest = word.partition("-")
    if rest.split("-")[0] in lists.prepositions:
        return f"{singular(first)}-{rest}"
    if word.endswith("'"):
        return singular(word[:-1]) + "'s"
    if not word or word in lists.kept or word.endswith(lists.ie_plurals):
        return word
    for plural, replacement in lists.irregular.items():
        if word.endswith(plural):
            return word.removesuffix(plural) + replacement
    for pattern, ending in lists.endings:
        if pattern.search(word):
            return pattern.sub(rf"\g<1>{ending}", word)
    return word


def singulars(text: str) -> list[str]:
    """Singular form of every token, each by itself."""
    return [singular(token) for token in tokens(text)]
