"""Tagged words and WordNet lemmas by NLTK, for the scorers that were published with them.

OPERA's CHAIR (https://arxiv.org/abs/2311.17911) and AMBER's script read a text so: Treebank tokens
by sentence, the averaged perceptron tagger, WordNet's lemma of each word as what it is tagged.
NLTK is an extra, and its data comes with no package: both are asked for on first use, and what is
missing is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from eval.errors import EvalError

DATA = {
    "punkt_tab": "tokenizers/punkt_tab",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "wordnet": "corpora/wordnet/",  # NLTK leaves it zipped, and finds it there with the slash only
}
# first letter of a Penn Treebank tag, to WordNet's part of speech; all others count as nouns
_PARTS = {"J": "a", "V": "v", "N": "n", "R": "r"}


@dataclass(frozen=True)
class Tools:
    """The functions that are used of NLTK.

    tokens: of a text
    tag: (token, Penn Treebank tag) pairs of tokens
    lemma: of a word as a part of speech
    """

    tokens: Callable[[str], Sequence[str]]
    tag: Callable[[Sequence[str]], Sequence[tuple[str, str]]]
    lemma: Callable[[str, str], str]


def lemmas(text: str) -> list[str]:
    """Lemma of every lower-cased token, as the part of speech that it has among the others."""
    tools = nltk_tools()
    tagged = tools.tag(tools.tokens(text.lower()))
    return [tools.lemma(word, _PARTS.get(tag[:1], "n")) for word, tag in tagged]


def nouns(text: str) -> list[str]:
    """Lemmas of the tokens that are tagged as nouns, proper ones too; case is kept."""
    tools = nltk_tools()
    tagged = tools.tag(tools.tokens(text))
    return [tools.lemma(word, "n") for word, tag in tagged if tag.startswith("NN")]


@cache
def nltk_tools() -> Tools:
    """NLTK's tokeniser, tagger and lemmatiser; `EvalError` says what of them is not installed."""
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer
    except ImportError:
        raise EvalError(
            'these rules need NLTK, which is not installed: pip install -e ".[nltk]", then '
            f"python -m nltk.downloader {' '.join(DATA)}."
        ) from None
    if missing := [name for name, path in DATA.items() if not _is_installed(nltk.data.find, path)]:
        raise EvalError(
            f"NLTK is installed without its data {' and '.join(missing)}: "
            f"python -m nltk.downloader {' '.join(missing)}. On a machine without internet copy "
            "the folder nltk_data from another one and set NLTK_DATA to it."
        )
    return Tools(nltk.word_tokenize, nltk.pos_tag, WordNetLemmatizer().lemmatize)


def _is_installed(find: Callable[[str], object], path: str) -> bool:
    try:
        find(path)
    except LookupError:
        return False
    return True
