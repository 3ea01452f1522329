"""HallusionBench from files: questions, answers made elsewhere, and what a judge says of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.answers import answer_text, read_answers
from eval.benchmarks.hallusionbench import Key, Question, score, score_parsed, verdict_of
from eval.benchmarks.hallusionbench.diagnosis import diagnose
from eval.benchmarks.joining import capped
from eval.benchmarks.judge import NO_JUDGE, Judge, Template, TemplateOptions, shipped
from eval.benchmarks.parsers import ParserName
from eval.benchmarks.rows import Row, read_rows
from eval.errors import EvalError


def score_files(
    answers: Path,
    questions: Path,
    parser: ParserName = "strict",
    judging: TemplateOptions = NO_JUDGE,
    same_template: Path | None = None,
) -> dict[str, Any]:
    """HallusionBench answers, by a parser or a judge.

    Only answered questions count: 951 of the 1129 have an image, and many evaluations ask no
    others, so the two kinds of run do not compare.

    answers: rows with model_prediction
    questions: HallusionBench.json
    parser: how an answer is read without a judge
    same_template: prompt that holds two answers together
    """
    known = {question.key: question for question in read_questions(questions)}
    rows = read_answers(answers)
    answered = _questions_of(rows, known, questions)
    texts = [answer_text(row) for row in rows]
    sizes = {"answered": len(answered), "all_questions": len(known)}
    judge = judging.open()
    if judge is None:
        return {**score_parsed(answered, texts, parser), **sizes}
    prompt = judging.prompt("hallusionbench")
    values = _judged(judge, prompt, answered, texts)
    second = Template.load(same_template or shipped("hallusionbench_same"))
    same = _judged_same(judge, second, answered, texts, values)
    how = judging.named(prompt) | {"same_template": second.name}
    return {**score(answered, values, same), **sizes, **how}


def _judged(
    judge: Judge, template: Template, questions: Sequence[Question], texts: Sequence[str]
) -> list[int]:
    prompts = {
        "/".join(q.key): template.fill(question=q.text, reference=q.reference, answer=text)
        for q, text in zip(questions, texts, strict=True)
    }
    return [verdict_of(reply) for reply in judge.replies(prompts).values()]


def _judged_same(
    judge: Judge,
    template: Template,
    questions: Sequence[Question],
    texts: Sequence[str],
    verdicts: Sequence[int],
) -> set[Key]:
    """The same by a judge, whose request is sent where the diagnosis depends on it."""
    responses = {question.key: text for question, text in zip(questions, texts, strict=True)}
    values = {question.key: value for question, value in zip(questions, verdicts, strict=True)}
    prompts = {}
    for question in questions:
        value, first = values[question.key], question.first
        if first is None or first not in responses:
            continue
        kinds = {diagnose(question.category, value, values[first], s) for s in (False, True)}
        if len(kinds) > 1:
            prompts[question.key] = template.fill(
                first=responses[first], answer=responses[question.key]
            )
    replies = judge.replies({"/".join(("same", *key)): text for key, text in prompts.items()})
    pairs = zip(prompts, replies.values(), strict=True)
    return {key for key, reply in pairs if "same" in reply.lower()}


def read_questions(path: Path) -> list[Question]:
    """The questions of `HallusionBench.json`, in its order."""
    return [_question(row) for row in read_rows(path)]


def _key(row: Row) -> Key:
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return tuple(str(row.first(name)) for name in names)


def _question(row: Row) -> Question:
    category, subcategory, set_id, figure_id, question_id = _key(row)
    label = str(row.first("gt_answer"))
    if label not in ("0", "1"):
        raise EvalError(f"{row.where}: the field 'gt_answer' is {label!r}; expected 0 or 1.")
    return Question(
        category,
        subcategory,
        set_id,
        figure_id,
        question_id,
        str(row.first("visual_input")),
        row.text("question"),
        row.text("gt_answer_details"),
        "yes" if label == "1" else "no",
    )


def _questions_of(rows: Sequence[Row], known: Mapping[Key, Question], path: Path) -> list[Question]:
    """The question of each answer, by its five ids; `EvalError` names unknown and repeated ones."""
    keys = [_answer_key(row) for row in rows]
    unknown = [(row, key) for row, key in zip(rows, keys, strict=True) if key not in known]
    if unknown:
        names = capped(["/".join(key) for _, key in unknown])
        raise EvalError(f"{unknown[0][0].where}: question {names} is not in {path}.")
    if twice := ["/".join(key) for key, times in Counter(keys).items() if times > 1]:
        raise EvalError(f"HallusionBench: question {capped(twice)} is answered more than once.")
    return [known[key] for key in keys]


def _answer_key(row: Row) -> Key:
    """Of an answer: the five ids, or VLMEvalKit's `index`, which ends in set, figure, question."""
    index = str(row.fields.get("index", "")).split("_")
    if row.has("set_id") or len(index) != 6:
        return _key(row)
    category, subcategory, _, *numbers = index
    return category, subcategory, *numbers
