"""AMBER from files: its annotations, and responses made elsewhere. Needs no model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.benchmarks import echo
from eval.benchmarks.amber import GENERATIVE, TYPES, Item, score
from eval.benchmarks.amber.nouns import Nouns, Similarity, read_lexicon
from eval.benchmarks.answers import answer_text, read_answers
from eval.benchmarks.joining import capped
from eval.benchmarks.parsers import ParserName
from eval.benchmarks.rows import Row, read_rows
from eval.errors import EvalError


def score_files(
    responses: Path,
    data: Path,
    nouns: Nouns = "nltk",
    similarity: Similarity = "exact",
    parser: ParserName = "official",
) -> dict[str, Any]:
    """AMBER responses (id, response): descriptions, questions or both.

    Which image a question is about stands in `query_all.json`; without it each is drawn alone.

    responses: JSON list in the official form
    data (DIR): annotations.json, relation.json, safe_words.txt
    nouns: what counts as a noun; nltk is official
    similarity: when two nouns mean the same
    parser: how an answer is read
    """
    items = read_items(data / "annotations.json")
    prompts: dict[int, str] = {}
    if (queries := data / "query_all.json").is_file():
        by_id = {_id(row): row for row in read_rows(queries)}
        prompts = {n: row.text("query") for n, row in by_id.items()}
        images = {n: row.text("image") for n, row in by_id.items()}
        items = {n: replace(item, image=images.get(n, "")) for n, item in items.items()}
    given = [(row, _id(row), answer_text(row)) for row in read_answers(responses)]
    unknown = [(row, number) for row, number, _ in given if number not in items]
    if unknown:
        ids = capped([str(number) for _, number in unknown])
        raise EvalError(f"{unknown[0][0].where}: id {ids} is not in {data / 'annotations.json'}.")
    pairs = [(number, text) for _, number, text in given]
    lexicon = read_lexicon(data)
    scores = score(pairs, items, lexicon, nouns, similarity, parser=parser)
    captions = [(text, prompts.get(n, "")) for n, text in pairs if items[n].type == GENERATIVE]
    if GENERATIVE in scores:
        scores[GENERATIVE]["flags"] = echo.flags(captions)
    return {**scores, "flags": _unanswered(pairs, items)}


def _unanswered(responses: Sequence[tuple[int, str]], items: Mapping[int, Item]) -> list[str]:
    """How many ids of the parts that are scored have no response."""
    answered = {number for number, _ in responses}
    flags = []
    for name, described in (("descriptions", True), ("questions", False)):
        expected = [n for n, item in items.items() if (item.type == GENERATIVE) == described]
        missing = [str(number) for number in expected if number not in answered]
        if 0 < len(missing) < len(expected):
            flags.append(
                f"{len(missing)} of {len(expected)} {name} have no response: id {capped(missing)}"
            )
    return flags


def read_items(path: Path) -> dict[int, Item]:
    """`annotations.json`, by id."""
    return {_id(row): _item(row) for row in read_rows(path)}


def _item(row: Row) -> Item:
    kind = row.text("type")
    if kind not in TYPES:
        raise EvalError(f"{row.where}: type {kind!r}; expected one of {', '.join(sorted(TYPES))}.")
    if kind == GENERATIVE:
        return Item(kind, row.texts("truth"), row.texts("hallu"))
    answer = row.text("truth")
    if answer not in ("yes", "no"):
        raise EvalError(f"{row.where}: the field 'truth' is {answer!r}; expected 'yes' or 'no'.")
    return Item(kind, (), answer=answer)


def _id(row: Row) -> int:
    return row.number("id")
