"""How a free answer is read as yes or no: the rules in use for POPE and its like, by name.

They agree on "Yes" and "No", and on little else. `official` (RUCAIBox/POPE, and LLaVA's script)
takes all that it cannot read for a yes, and so does `opera` (OPERA, PAI, VISTA). The others leave
such answers unread. VCD's rule is not here: it looks at the label before it reads the answer.

What `official` means depends on the benchmark: `official` is POPE's; AMBER's and MME's are
`amber_official` and `mme_official`, and stand under that name in AMBER_PARSERS and MME_PARSERS.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

from eval.errors import EvalError

ParserName: TypeAlias = Literal[
    "official", "strict", "first_word", "opera", "vlmevalkit", "lmms_eval"
]
Reading: TypeAlias = Literal["yes", "no"] | None
Parser: TypeAlias = Callable[[str], Reading]


def says_no(answer: str) -> bool:
    """The official parser: "No", "no" or "not" is a word of the first sentence; all else is yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.isdisjoint(words)


def official(answer: str) -> Reading:
    return "no" if says_no(answer) else "yes"


def opera(answer: str) -> Reading:
    """Like the official one on all sentences; "NO" and words that end in n't are a no too."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    denied = any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words)
    return "no" if denied else "yes"


def strict(answer: str) -> Reading:
    """The word that the answer starts with, else the only one of both that it has."""
    words = _words(answer)
    return first_word(answer) or _only(words)


def first_word(answer: str) -> Reading:
    """The first word, if it is yes or no."""
    words = _words(answer)
    return _only(words[:1])


def vlmevalkit(answer: str) -> Reading:
    """The only one of both words that the answer has (VLMEvalKit without its judge)."""
    return _only(_words(answer))


def lmms_eval(answer: str) -> Reading:
    """The whole answer but for case and white space (lmms-eval)."""
    return _only([answer.lower().strip()])


def _words(answer: str) -> list[str]:
    return re.findall(r"[a-z]+", answer.lower())


def _only(words: list[str]) -> Reading:
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


PARSERS: Mapping[str, Parser] = {
    parser.__name__: parser
    for parser in (official, strict, first_word, opera, vlmevalkit, lmms_eval)
}


def amber_official(answer: str) -> Reading:
    """AMBER's script: the answer is "Yes" or "No" to the letter."""
    return "yes" if answer == "Yes" else "no" if answer == "No" else None


def mme_official(answer: str) -> Reading:
    """MME's script: the first four characters hold "yes", else "no"; "Nope" is a no."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


AMBER_PARSERS: Mapping[str, Parser] = {**PARSERS, "official": amber_official}
MME_PARSERS: Mapping[str, Parser] = {**PARSERS, "official": mme_official}
# its official reading is a judge's
HALLUSIONBENCH_PARSERS: Mapping[str, Parser] = {"strict": strict, **PARSERS}


def parser_named(name: str, known: Mapping[str, Parser] = PARSERS) -> Parser:
    """The parser of that name among those of a benchmark; `EvalError` lists them."""
    if name not in known:
        raise EvalError(f"parser {name!r}: expected one of {', '.join(known)}.")
    return known[name]


def readable(answer: str) -> bool:
    """Whether the strict parser finds an answer: yes or no stand first, or only one of them does.

    The official parser takes an empty answer, "Maybe" or "I cannot see one" for a yes.
    """
    return strict(answer) is not None


def read_otherwise(
    answers: Sequence[str], parser: str, known: Mapping[str, Parser] = PARSERS
) -> int:
    """How many answers the strict parser reads, but not as this one does."""
    read = parser_named(parser, known)
    return sum(strict(text) not in (None, read(text)) for text in answers)


def otherwise(count: int, answers: int, parser: str) -> list[str]:
    """The flag that says so."""
    if not count:
        return []
    return [
        f"{count} of {answers} answers are read otherwise by the strict parser than by {parser}"
    ]


def reading_flags(
    answers: Sequence[str], parser: str, known: Mapping[str, Parser] = PARSERS
) -> list[str]:
    """What a reader should know of how these answers were read: how many are neither yes nor no,
    and how many the strict parser reads otherwise."""
    read = parser_named(parser, known)
    unread = sum(read(text) is None for text in answers)
    flags = (
        [f"{unread} of {len(answers)} answers are neither yes nor no to the {parser} parser"]
        if unread
        else []
    )
    return flags + otherwise(read_otherwise(answers, parser, known), len(answers), parser)
