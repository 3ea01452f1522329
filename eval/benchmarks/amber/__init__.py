"""AMBER: what a description makes up and what it covers, and yes/no questions of five kinds.

Wang et al. 2023, https://arxiv.org/abs/2311.07397; data and official script: junyangwang0410/AMBER.
A row of each file: `{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}`,
`{"id": 1, "type": "generative", "truth": ["sky", "forest"], "hallu": ["cloud", "sun"]}`,
`{"id": 1, "response": "The image features three people walking ..."}`; ids from 1005 on are
questions with `truth` yes or no, which the official parser wants answered by exactly "Yes" or "No".
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from eval.benchmarks.amber import nouns as words
from eval.benchmarks.amber.nouns import Lexicon, Similar
from eval.benchmarks.intervals import Numbers, Tally, grouped, ratio
from eval.benchmarks.joining import capped
from eval.benchmarks.parsers import AMBER_PARSERS, parser_named, reading_flags
from eval.errors import EvalError

GENERATIVE = "generative"
OVERALL = "overall"
# what the script reports, and the question types that it pools for it
DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "existence": ("discriminative-hallucination",),
    "attribute": tuple(
        f"discriminative-attribute-{kind}" for kind in ("state", "number", "action")
    ),
    "state": ("discriminative-attribute-state",),
    "number": ("discriminative-attribute-number",),
    "action": ("discriminative-attribute-action",),
    "relation": ("discriminative-relation", "relation"),
}
TYPES = {GENERATIVE, *(kind for kinds in DIMENSIONS.values() for kind in kinds)}


@dataclass(frozen=True)
class Item:
    """The annotation of one id.

    type: "generative", or the kind of a question
    truth: words that a description should cover
    hallu: words that it may make up
    answer: "yes" or "no" to a question
    image: file name, where it is known; questions about one image are drawn together
    """

    type: str
    truth: Sequence[str]
    hallu: Sequence[str] = ()
    answer: str = ""
    image: str = ""


@dataclass(frozen=True)
class Counts:
    """What one description adds; the names in the official script stand behind."""

    descriptions: int  # non_hallu_num
    descriptions_hallucinated: int  # non_hallu_num - non_hallu_score
    nouns: int  # chair_num
    nouns_hallucinated: int  # chair_score
    truth_words: int  # safe_cover_num
    truth_words_covered: int  # safe_cover_score
    hallu_words: int  # hallu_cover_num
    hallu_words_covered: int  # hallu_cover_score


def judge(nouns: Sequence[str], item: Item, lexicon: Lexicon, similar: Similar) -> Counts:
    """One description, of which `nouns` are those in the lexicon, in order, repeats kept."""
    present, imagined = lexicon.chain(item.truth), lexicon.chain(item.hallu)
    covered: set[int] = set()
    marked: set[int] = set()
    hallucinated = 0
    for noun in nouns:
        if noun in lexicon.safe:
            continue
        if (index := _index_of(noun, present)) is not None:
            covered.add(index)
            continue
        index = _index_of(noun, imagined)
        near = _index_of(noun, imagined, similar)
        marked |= {spot for spot in (index, near) if spot is not None}
        if (index := _index_of(noun, present, similar)) is not None:
            covered.add(index)
        else:
            hallucinated += 1
    return Counts(
        1,
        int(hallucinated > 0),
        len(nouns),
        hallucinated,
        len(item.truth),
        len(covered),
        len(item.hallu),
        len(marked),
    )


def _index_of(
    noun: str, chain: Sequence[tuple[str, int]], similar: Similar = str.__eq__
) -> int | None:
    """Number of the word behind the first entry of a chain that is like the noun."""
    return next((number for word, number in chain if similar(noun, word)), None)


def score(
    responses: Sequence[tuple[int, str]],
    items: Mapping[int, Item],
    lexicon: Lexicon,
    nouns: str = "nltk",
    similarity: str = "exact",
    seed: int = 0,
    parser: str = "official",
) -> dict[str, Any]:
    """AMBER's measures of (id, response) pairs, as shares in [0, 1] with 95 % intervals.

    `nouns` names how descriptions are read, `similarity` when two nouns mean the same (see
    `amber.nouns`), and `parser`, one of AMBER_PARSERS, how answers are read. Only the parts that
    there are responses for are reported. `official` holds the percentages as the script prints
    them. `EvalError` if an id is unknown or answered twice.
    """
    result: dict[str, Any] = {"responses": len(responses)}
    for name, part in tallies(responses, items, lexicon, nouns, similarity, parser).items():
        if name == GENERATIVE:
            result[name] = {**part.report(seed), "nouns": nouns, "similarity": similarity}
        elif name == OVERALL:
            result[name] = part.report(seed)
        else:
            count = {"n": int(part.counts["asked"].sum())}
            result.setdefault("discriminative", {})[name] = part.report(seed) | count
    if "discriminative" in result:
        answers = [text for number, text in responses if items[number].type != GENERATIVE]
        flags = reading_flags(answers, parser, AMBER_PARSERS)
        result["discriminative"]["all"] |= {"parser": parser, "flags": flags}
    result["official"] = official(result)
    return result


def tallies(
    responses: Sequence[tuple[int, str]],
    items: Mapping[int, Item],
    lexicon: Lexicon,
    nouns: str = "nltk",
    similarity: str = "exact",
    parser: str = "official",
) -> dict[str, Tally]:
    """What each response adds: "generative", of the questions "all" and every dimension, and what
    each image adds to the AMBER score, "overall".
    """
    _require_items([number for number, _ in responses], items)
    described = [(items[n], text) for n, text in responses if items[n].type == GENERATIVE]
    answered = [(items[n], text) for n, text in responses if items[n].type != GENERATIVE]
    result = {}
    if described:
        result[GENERATIVE] = _generative(described, lexicon, nouns, similarity)
    parts = {"all": answered}
    for name, kinds in DIMENSIONS.items():
        parts[name] = [pair for pair in answered if pair[0].type in kinds]
    result |= {name: _questions(part, parser) for name, part in parts.items() if part}
    if described and answered:
        result[OVERALL] = _overall(result[GENERATIVE].counts, described, answered, parser)
    return result


def _require_items(numbers: Sequence[int], items: Mapping[int, Item]) -> None:
    if not numbers:
        raise EvalError("AMBER: there are no responses to score.")
    if unknown := [str(number) for number in dict.fromkeys(numbers) if number not in items]:
        raise EvalError(
            f"AMBER: id {capped(unknown)} is not in the annotations ({len(items)} ids)."
        )
    if twice := [str(number) for number, times in Counter(numbers).items() if times > 1]:
        raise EvalError(f"AMBER: id {capped(twice)} has more than one response; keep one of them.")


def _generative(
    described: Sequence[tuple[Item, str]], lexicon: Lexicon, nouns: str, similarity: str
) -> Tally:
    read, similar = words.reader(nouns), words.similarity(similarity)
    judged = [judge(read(text, lexicon), item, lexicon, similar) for item, text in described]
    columns = {f.name: np.array([getattr(c, f.name) for c in judged]) for f in fields(Counts)}
    columns["words"] = np.array([len(text.split()) for _, text in described])
    return Tally(columns, _generative_ratios)


def _generative_ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    """Over all descriptions. `cog` is a share of the annotated words, as in the script; the paper
    divides by the mentioned ones. `mean_words` stands beside, as longer texts cover and err more.
    """
    return {
        "chair": (c["nouns_hallucinated"], c["nouns"]),
        "cover": (c["truth_words_covered"], c["truth_words"]),
        "hal": (c["descriptions_hallucinated"], c["descriptions"]),
        "cog": (c["hallu_words_covered"], c["hallu_words"]),
        "mean_words": (c["words"], c["descriptions"]),
    }


def _questions(answered: Sequence[tuple[Item, str]], parser: str) -> Tally:
    columns = _question_counts(answered, parser)
    return Tally(grouped(columns, _images(answered)), _question_ratios, columns["right"])


def _question_counts(answered: Sequence[tuple[Item, str]], parser: str) -> dict[str, Numbers]:
    """ "No" is the positive class; what the parser reads as neither is wrong."""
    read = parser_named(parser, AMBER_PARSERS)
    readings = np.array([read(text) or "" for _, text in answered])
    absent = np.array([item.answer == "no" for item, _ in answered])
    no, yes = readings == "no", readings == "yes"
    columns = {
        "asked": np.ones(len(answered)),
        "right": (no & absent) | (yes & ~absent),
        "right_no": no & absent,
        "said_no": no,
        "labelled_no": absent,
        "unreadable": ~no & ~yes,
    }
    return {name: column.astype(np.float64) for name, column in columns.items()}


def _images(given: Sequence[tuple[Item, str]]) -> list[str]:
    """What is drawn together: the image of each response, or where it is unknown its index."""
    return [item.image or str(index) for index, (item, _) in enumerate(given)]


def _overall(
    generative: Mapping[str, Numbers],
    described: Sequence[tuple[Item, str]],
    answered: Sequence[tuple[Item, str]],
    parser: str,
) -> Tally:
    """What each image adds by its description and by its questions."""
    questions = _question_counts(answered, parser)
    none, no_question = np.zeros(len(described)), np.zeros(len(answered))
    columns = {name: np.concatenate((column, no_question)) for name, column in generative.items()}
    columns |= {name: np.concatenate((none, column)) for name, column in questions.items()}
    return Tally(grouped(columns, _images([*described, *answered])), _overall_ratios)


def _overall_ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    """The AMBER score, (1 - CHAIR + F1) / 2, as one fraction."""
    chair, f1 = _generative_ratios(c)["chair"], _question_ratios(c)["f1"]
    share = 1 - ratio(*chair) + ratio(*f1)
    return {"amber_score": (share, np.full_like(share, 2))}


def _question_ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    return {
        "accuracy": (c["right"], c["asked"]),
        "precision": (c["right_no"], c["said_no"]),
        "recall": (c["right_no"], c["labelled_no"]),
        "f1": (2 * c["right_no"], c["said_no"] + c["labelled_no"]),
        "unreadable": (c["unreadable"], c["asked"]),
    }


def official(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the published script prints: percent with one decimal; F1 from the rounded two."""
    printed: dict[str, dict[str, float]] = {}
    if GENERATIVE in result:
        printed[GENERATIVE] = _printed_generative(result[GENERATIVE]["counts"])
    for name, part in result.get("discriminative", {}).items():
        printed["discriminative" if name == "all" else name] = _printed(part, name)
    return printed


def _printed_generative(counts: Mapping[str, int]) -> dict[str, float]:
    """The script's counters of what it divides by start at 0.001."""
    free = counts["descriptions"] - counts["descriptions_hallucinated"]
    shares = {
        "CHAIR": (counts["nouns_hallucinated"], counts["nouns"]),
        "Cover": (counts["truth_words_covered"], counts["truth_words"]),
        "Hal": (free, counts["descriptions"]),
        "Cog": (counts["hallu_words_covered"], counts["hallu_words"]),
    }
    percent = {
        name: round(100 * top / (bottom + 0.001), 1) for name, (top, bottom) in shares.items()
    }
    return {**percent, "Hal": round(100 - percent["Hal"], 1)}


def _printed(part: Mapping[str, Any], dimension: str) -> dict[str, float]:
    percent = {
        shown: round(100 * part[name], 1)
        for name, shown in (
            ("accuracy", "Accuracy"),
            ("precision", "Precision"),
            ("recall", "Recall"),
        )
    }
    precision, recall = percent["Precision"] / 100, percent["Recall"] / 100
    # the script keeps from dividing by zero so
    bottom = precision + recall + (0.001 if dimension == "existence" else 0.0001)
    return {**percent, "F1": round(100 * float(ratio(2 * precision * recall, bottom)), 1)}
