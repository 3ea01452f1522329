"""LLaVA-Bench (in the wild): 60 questions on 24 images, answers marked beside those of GPT-4.

Liu et al. 2023, https://arxiv.org/abs/2304.08485. One row of the answers: `{"question_id": 0,
"prompt": "What is the name of this famous sight?", "text": "Diamond Head", "answer_id": "...",
"model_id": "llava-v1.5-13b", "metadata": {}}`; of the questions: the same `question_id`, `image`,
`text`, and `category` conv, detail or complex.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from eval.benchmarks.answers import answer_text, read_answers
from eval.benchmarks.base import Benchmark
from eval.benchmarks.intervals import Numbers, measure
from eval.benchmarks.joining import join
from eval.benchmarks.judge import NO_JUDGE, JudgeOptions, Template, shipped
from eval.benchmarks.rows import Row, read_json, read_rows
from eval.errors import EvalError

Marks: TypeAlias = tuple[float, float]


def marks(reply: str) -> Marks | None:
    """The two numbers of a reply's first line, for the reference and for the model."""
    parts = re.split(r"[,\s]+", reply.strip().split("\n")[0].strip())
    try:
        reference, model = (float(part) for part in parts)
    except ValueError:
        return None
    return reference, model


def score(
    judged: Sequence[Marks | None], categories: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Mean mark of the model in percent of the reference's, for all questions and by category.

    Replies without two marks are left out and counted in `unmarked` (the published script takes
    them for -1 and leaves them in the mean).
    """
    if not judged or len(judged) != len(categories):
        raise EvalError(f"LLaVA-Bench: {len(judged)} marks for {len(categories)} questions.")
    pairs = list(zip(judged, categories, strict=True))
    valid = [(mark, name) for mark, name in pairs if mark is not None]
    if not valid:
        raise EvalError("LLaVA-Bench: no reply of the judge begins with two marks.")
    parts = {"all": [mark for mark, _ in valid]}
    for name in dict.fromkeys(name for _, name in valid):
        parts[name] = [mark for mark, category in valid if category == name]
    result: dict[str, Any] = {name: _part(part, seed) for name, part in parts.items()}
    return {**result, "questions": len(judged), "unmarked": len(judged) - len(valid)}


def _part(part: Sequence[Marks], seed: int) -> dict[str, Any]:
    reference, model = np.array(part, dtype=np.float64).T
    columns = {"reference": reference, "model": model, "questions": np.ones(len(part))}
    measured = measure(columns, _ratios, seed)
    return {**measured["values"], "intervals": measured["intervals"], "questions": len(part)}


def _ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    return {
        "score": (100 * c["model"], c["reference"]),
        "mean_reference": (c["reference"], c["questions"]),
        "mean_model": (c["model"], c["questions"]),
    }


def score_files(
    answers: Path,
    data: Path,
    export: Path | None = None,
    judging: JudgeOptions = NO_JUDGE,
    rules: Path | None = None,
    subset: bool = False,
) -> dict[str, Any]:
    """LLaVA-Bench (in the wild) answers, marked by a judge beside GPT-4's.

    answers: JSON lines with question_id and text
    data (DIR): questions, context and answers_gpt4 .jsonl
    export: write the answers as the published judge takes them
    rules: rule.json of LLaVA (default: our own wording)
    subset: leave out answers to questions that are not in the file
    """
    questions = read_rows(data / "questions.jsonl")
    joined = join(questions, read_answers(answers), (data / "questions.jsonl", answers), subset)
    pairs = zip(questions, joined.rows, strict=True)
    given = {question.number("question_id"): answer_text(row) for question, row in pairs}
    if export is not None:
        lines = (
            _exported(question, given[question.number("question_id")]) for question in questions
        )
        export.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if judging.open() is None:
            return {"exported": len(questions), "file": str(export)}
    judge = judging.required("LLaVA-Bench", temperature=0.2)
    name, prompts = _prompts(questions, given, data, rules)
    replies = judge.replies(prompts)
    categories = [question.text("category") for question in questions]
    result = score([marks(reply) for reply in replies.values()], categories)
    how = {"rules": name, "judge": judging.name}
    return {**result, **how, "joined_by": joined.by, "flags": joined.notes}


def _prompts(
    questions: Sequence[Row], given: Mapping[int, str], data: Path, rules: Path | None
) -> tuple[str, dict[str, str]]:
    """Name of the rules, and the prompt of every question by its id."""
    contexts = {row.text("image"): row.text("caption") for row in read_rows(data / "context.jsonl")}
    references = _by_question(data / "answers_gpt4.jsonl")
    name, rule = _rules(rules)
    prompts = {}
    for question in questions:
        number, image = question.number("question_id"), question.text("image")
        if image not in contexts or number not in references:
            raise EvalError(
                f"{question.where}: context.jsonl or answers_gpt4.jsonl in {data} has no row of it."
            )
        context, first, second = contexts[image], references[number], given[number]
        prompts[str(number)] = (
            f"[Context]\n{context}\n\n[Question]\n{question.text('text')}\n\n"
            f"[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n"
            f"[System]\n{rule(question.text('category'))}\n\n"
        )
    return name, prompts


def _rules(path: Path | None) -> tuple[str, Any]:
    """Name of the rules, and a function from category to rule."""
    if path is None:
        own = Template.load(shipped("llava_bench"))
        return own.name, lambda category: own.text.strip()
    data = read_json(path)
    name = f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"

    def rule(category: str) -> str:
        try:
            return str(data[f"llava_bench_{category}"]["prompt"])
        except (LookupError, TypeError):
            raise EvalError(f"{path}: no rule llava_bench_{category} with a prompt.") from None

    return name, rule


def _by_question(path: Path) -> dict[int, str]:
    return {row.number("question_id"): row.text("text", "answer") for row in read_rows(path)}


def _exported(question: Row, text: str) -> dict[str, Any]:
    number = question.number("question_id")
    identity = hashlib.sha256(f"{number} {text}".encode()).hexdigest()[:22]
    fields = {"question_id": number, "prompt": question.text("text")}
    return {**fields, "text": text, "answer_id": identity, "model_id": "", "metadata": {}}


class LlavaBench(Benchmark):
    """Scored from files only."""

    name = "llava-bench"
    score_files = staticmethod(score_files)
