"""Which words of a question carry content."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from vlm_patch.errors import PatchError

# Closed classes of English, so the list is complete in kind: articles and determiners, pronouns,
# prepositions, conjunctions, auxiliaries and modals, question words, particles, and the politeness
# of prompts.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any each every either neither both all no none such
    another other i me my mine myself you your yours yourself he him his himself she her hers
    herself it its itself we us our ours ourselves they them their theirs themselves one ones
    someone anyone everyone something anything everything nothing of in on at by for from with
    without to into onto over under above below between among through during before after behind
    beside besides beyond near off out up down across along around against about toward towards
    upon within via per as than like and or but nor so yet if then else because while although
    though unless until whether am is are was were be been being do does did doing done have has
    had having can could will would shall should may might must ought what which who whom whose
    when where why how there here not n't yes please also too very just only even still ever 's
    're 've 'll 'd 'm isn't aren't wasn't weren't don't doesn't didn't can't couldn't won't
    wouldn't shouldn't hasn't haven't hadn't it's there's that's what's i'm you're
    """.split()  # noqa: SIM905
)
WORD = re.compile(r"\w+(?:['’]\w+)*")
JOINED = re.compile(r"(\w+?)(n't|'\w+)")
SPACY_TAGS = frozenset({"NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"})


def content_words(text: str) -> list[tuple[int, int]]:
    """Character spans of the words that are no English function words."""
    return [
        match.span()
        for match in WORD.finditer(text)
        if not _is_function_word(match.group().lower().replace("’", "'"))
    ]


def _is_function_word(word: str) -> bool:
    """Also where it is put together of two ("who's", "mustn't")."""
    parts = JOINED.fullmatch(word)
    return word in FUNCTION_WORDS or (
        parts is not None and FUNCTION_WORDS.issuperset(parts.groups())
    )


def spacy_words(text: str) -> list[tuple[int, int]]:
    """Character spans of nouns, proper nouns, verbs, adjectives, adverbs and numbers. Raises
    PatchError without spaCy.
    """
    tagged = _tagger()(text)
    return [(t.idx, t.idx + len(t.text)) for t in tagged if t.pos_ in SPACY_TAGS]


@lru_cache(maxsize=1)
def _tagger() -> Callable[[str], Any]:
    try:
        import spacy

        tagger: Callable[[str], Any] = spacy.load("en_core_web_sm", disable=["parser", "ner"])
    except (ImportError, OSError) as error:
        raise PatchError(
            f'GIFT(words="spacy") needs spaCy and its model en_core_web_sm ({error}). Install both '
            '(pip install spacy; python -m spacy download en_core_web_sm), or use words="content".'
        ) from error
    return tagger
