"""HallusionBench: yes/no questions about figures, edited figures, and none at all.

Guan et al. 2023, https://arxiv.org/abs/2310.14566. One row, shortened: `{"category": "VS",
"subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": "1", "question_id": "0",
"question": "Is China ... in 2018?", "gt_answer_details": "Switzerland is ...", "gt_answer": "0",
"filename": "./hallusion_bench/VS/chart/0_1.png"}`, and `model_prediction` where it is answered.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from eval.benchmarks.hallusionbench.diagnosis import KINDS, RIGHT, UNCLEAR, WRONG, diagnose
from eval.benchmarks.intervals import Numbers, Tally
from eval.benchmarks.parsers import HALLUSIONBENCH_PARSERS, parser_named, reading_flags
from eval.errors import EvalError

Key: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One question.

    category: "VD" (visual dependent) or "VS" (visual supplement)
    subcategory: kind of figure
    set_id, figure_id, question_id: numbers as text; figure "0" is the first form
    visual_input: "0" no image, "1" the original, "2" an edited one
    text: the question
    reference: the right answer in words
    label: "yes" or "no"
    """

    category: str
    subcategory: str
    set_id: str
    figure_id: str
    question_id: str
    visual_input: str
    text: str
    reference: str
    label: str

    @property
    def set(self) -> Key:
        return self.category, self.subcategory, self.set_id

    @property
    def pair(self) -> Key:
        """The same question on all figures of a set stands or falls together (qAcc)."""
        return *self.set, "question", self.question_id

    @property
    def figure(self) -> Key:
        """All questions about one figure stand or fall together (fAcc)."""
        return *self.set, "figure", self.figure_id

    @property
    def key(self) -> Key:
        return *self.set, self.figure_id, self.question_id

    @property
    def first(self) -> Key | None:
        """The same question on figure 0; None for that one itself."""
        return None if self.figure_id == "0" else (*self.set, "0", self.question_id)

    @property
    def blind(self) -> bool:
        """Asked without an image; to be unsure is right then."""
        return self.category == "VS" and self.figure_id == "0"


def verdict(answer: str, label: str, parser: str = "strict") -> int:
    """RIGHT, WRONG or UNCLEAR without a judge: what the parser reads against the label."""
    reading = parser_named(parser, HALLUSIONBENCH_PARSERS)(answer)
    return UNCLEAR if reading is None else RIGHT if reading == label else WRONG


def verdict_of(reply: str) -> int:
    """RIGHT, WRONG or UNCLEAR from a judge's reply, by the published rule."""
    text = reply.lower()
    return WRONG if "incorrect" in text else RIGHT if "correct" in text else UNCLEAR


def score(
    questions: Sequence[Question],
    verdicts: Sequence[int],
    same: Collection[Key] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """aAcc, qAcc, fAcc and their kin, as shares with 95 % intervals over sets of questions.

    Easy are the questions without an image or on the original one, hard those on an edited one;
    `*_q_acc` takes the same question on several figures for one. `yes_bias` is the share of yes
    among the answers less that among the labels, `false_yes` the share of wrong answers whose label
    is no. An unclear answer is wrong, but to a question without an image it is right. The kinds of
    failure (see `hallusionbench.diagnosis`) are shares of those that can be told: the first form
    of the question must have been answered too. `same` holds the questions whose answer repeats it.
    """
    scores = tally(questions, verdicts, same).report(seed)
    if untold := scores["counts"]["undiagnosed"]:
        scores["flags"] = [
            f"{untold} failures have no diagnosis: their questions' first form was not asked"
        ]
    return scores


def tally(
    questions: Sequence[Question], verdicts: Sequence[int], same: Collection[Key] = ()
) -> Tally:
    """What each set of questions adds."""
    if not questions or len(questions) != len(verdicts):
        raise EvalError(f"HallusionBench: {len(verdicts)} verdicts for {len(questions)} questions.")
    judged = list(zip(questions, verdicts, strict=True))
    right = {q.key: v == RIGHT or (q.blind and v == UNCLEAR) for q, v in judged}
    if len(right) < len(questions):
        raise EvalError("HallusionBench: a question is answered more than once.")
    sets: dict[Key, list[tuple[Question, int]]] = {}
    for question, value in judged:
        sets.setdefault(question.set, []).append((question, value))
    rows = [_counts(part, right) | _failures(part, same) for part in sets.values()]
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    marks = np.array([right[question.key] for question in questions], dtype=np.float64)
    return Tally(columns, _ratios, marks)


def _counts(part: Sequence[tuple[Question, int]], right: Mapping[Key, bool]) -> dict[str, int]:
    """Counts of one set."""
    questions = [question for question, _ in part]
    easy = [question for question in questions if question.visual_input != "2"]
    hard = [question for question in questions if question.visual_input == "2"]
    counts: dict[str, int] = {}
    for name, group in (("", questions), ("easy_", easy), ("hard_", hard)):
        counts[f"{name}questions"] = len(group)
        counts[f"{name}right"] = sum(right[question.key] for question in group)
        pairs = _groups((question.pair, right[question.key]) for question in group)
        counts[f"{name}pairs"] = len(pairs)
        counts[f"{name}pairs_right"] = sum(all(marks) for marks in pairs)
    seen = ((question.figure, right[question.key]) for question in questions if not question.blind)
    figures = _groups(seen)
    counts["figures"] = len(figures)
    counts["figures_right"] = sum(all(marks) for marks in figures)
    counts["figures_wrong"] = sum(not any(marks) for marks in figures)
    counts["unclear"] = sum(value == UNCLEAR for _, value in part)
    counts["labelled_yes"] = sum(question.label == "yes" for question in questions)
    # as the published script has it: what is not wrong repeats the label
    counts["said_yes"] = sum(right[q.key] == (q.label == "yes") for q in questions)
    wrong = [question for question in questions if not right[question.key]]
    counts["wrong"] = len(wrong)
    counts["wrong_labelled_no"] = sum(question.label == "no" for question in wrong)
    return counts


def _failures(part: Sequence[tuple[Question, int]], same: Collection[Key]) -> dict[str, int]:
    """How often each kind of failure occurs in one set, and how often it cannot be told."""
    verdicts = {question.key: value for question, value in part}
    kinds: list[str] = []
    for question, value in part:
        first = question.first
        if first is None or first in verdicts:
            before = None if first is None else verdicts[first]
            kinds.append(diagnose(question.category, value, before, question.key in same))
        elif value != RIGHT:
            kinds.append("undiagnosed")
    counts = {kind: kinds.count(kind) for kind in (*KINDS, "undiagnosed")}
    return {**counts, "diagnosed": sum(counts[kind] for kind in KINDS)}


def _groups(marks: Iterable[tuple[Key, bool]]) -> list[list[bool]]:
    groups: dict[Key, list[bool]] = {}
    for key, mark in marks:
        groups.setdefault(key, []).append(mark)
    return list(groups.values())


def _ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    torn = c["figures"] - c["figures_right"] - c["figures_wrong"]
    return {
        "a_acc": (c["right"], c["questions"]),
        "q_acc": (c["pairs_right"], c["pairs"]),
        "f_acc": (c["figures_right"], c["figures"]),
        "easy_a_acc": (c["easy_right"], c["easy_questions"]),
        "hard_a_acc": (c["hard_right"], c["hard_questions"]),
        "easy_q_acc": (c["easy_pairs_right"], c["easy_pairs"]),
        "hard_q_acc": (c["hard_pairs_right"], c["hard_pairs"]),
        "figures_inconsistent": (torn, c["figures"]),
        "figures_wrong": (c["figures_wrong"], c["figures"]),
        "yes_bias": (c["said_yes"] - c["labelled_yes"], c["questions"]),
        "false_yes": (c["wrong_labelled_no"], c["wrong"]),
        "unclear": (c["unclear"], c["questions"]),
        **{kind: (c[kind], c["diagnosed"]) for kind in KINDS},
    }


def repeated(
    questions: Sequence[Question], texts: Sequence[str], parser: str = "strict"
) -> set[Key]:
    """The questions whose answer is read like that to their first form."""
    read = parser_named(parser, HALLUSIONBENCH_PARSERS)
    readings = {question.key: read(text) for question, text in zip(questions, texts, strict=True)}
    return {
        question.key
        for question in questions
        if question.first in readings and readings[question.key] == readings[question.first]
    }


def score_parsed(
    questions: Sequence[Question], texts: Sequence[str], parser: str = "strict"
) -> dict[str, Any]:
    """The scores of answers that a parser reads, with what a reader should know of how it did."""
    pairs = zip(questions, texts, strict=True)
    values = [verdict(text, question.label, parser) for question, text in pairs]
    scores = score(questions, values, repeated(questions, texts, parser))
    flags = reading_flags(texts, parser, HALLUSIONBENCH_PARSERS)
    return {**scores, "flags": [*flags, *scores.get("flags", ())], "judge": None, "parser": parser}
