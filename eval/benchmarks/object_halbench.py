"""Object HalBench: CHAIR as RLHF-V reports it, over the objects that a response names once.

Yu et al. 2023, https://arxiv.org/abs/2312.00849. One response: `{"image_id": 397133, "answer":
"A man stands in a kitchen ..."}`. Published numbers let GPT-3.5 list the objects of a response and
spaCy lemmatise them. Here CHAIR's rules find them, in the response itself or in what a judge lists
of it, by the benchmark's own synonyms. A number is comparable with others of this scorer alike, not
with published ones, nor with CHAIR.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks import chair
from eval.benchmarks.base import Benchmark
from eval.benchmarks.chair.files import read_captions
from eval.benchmarks.coco import Rules, Vocabulary
from eval.benchmarks.intervals import Numbers, measure
from eval.benchmarks.judge import NO_JUDGE, TemplateOptions
from eval.errors import EvalError

SHORT = 3


def score(
    responses: Sequence[tuple[int, str]],
    truth: Mapping[int, Collection[str]],
    vocabulary: Vocabulary,
    listed: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Response-level and mention-level hallucination of (image id, response) pairs, as shares.

    The response level divides by the responses that name an object at all (`CHAIRs_refine`); each
    object counts once a response. Responses of three words or fewer name nothing. `listed` holds
    the objects of each response in words, where a judge has listed them.
    """
    if not responses:
        raise EvalError("Object HalBench: there are no responses to score.")
    texts = [text for _, text in responses] if listed is None else listed
    rows = [
        _counts(text, "" if short(text) else named, truth[image], vocabulary)
        for (image, text), named in zip(responses, texts, strict=True)
    ]
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    measured = measure(columns, _ratios, seed)
    return {
        **measured["values"],
        "counts": {name: int(column.sum()) for name, column in columns.items()},
        "intervals": measured["intervals"],
        "objects_by": "rules" if listed is None else "judge",
        "rules": vocabulary.rules,
        "vocabulary": vocabulary.name,
        "flags": [
            f"{name}: nothing to divide by, 0 by definition" for name in measured["undefined"]
        ],
    }


def short(text: str) -> bool:
    return len(text.split()) <= SHORT


def _counts(
    text: str, objects_text: str, truth: Collection[str], vocabulary: Vocabulary
) -> dict[str, int]:
    judged = chair.judge(objects_text, truth, vocabulary)
    named, present = set(judged.objects), set(truth)
    return {
        "responses": 1,
        "responses_with_objects": int(bool(named)),
        "responses_hallucinated": int(bool(named - present)),
        "objects": len(named),
        "objects_hallucinated": len(named - present),
        "gt_objects": len(present),
        "gt_objects_recalled": len(named & present),
        "words": len(text.split()),
    }


def _ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    return {
        "response_level": (c["responses_hallucinated"], c["responses_with_objects"]),
        "mention_level": (c["objects_hallucinated"], c["objects"]),
        "recall": (c["gt_objects_recalled"], c["gt_objects"]),
        "no_object_share": (c["responses"] - c["responses_with_objects"], c["responses"]),
        "mean_words": (c["words"], c["responses"]),
    }


def score_files(
    responses: Path,
    truth: Path,
    synonyms: Path | None = None,
    rules: Rules = "pattern",
    judging: TemplateOptions = NO_JUDGE,
) -> dict[str, Any]:
    """Object HalBench responses, by rules or a judge: response and mention level.

    With a judge it lists the objects of every response.

    responses: JSON list or JSON lines with image_id and answer
    truth (OBJECTS.json|COCO_DIR): objects file or COCO folder
    synonyms: synonyms_refine.txt (default: what ships)
    rules: how responses are read
    """
    vocabulary = Vocabulary.load(synonyms, rules)
    pairs, objects, echoes = read_captions(responses, truth, vocabulary)
    judge = judging.open()
    if judge is None:
        scores = score(pairs, objects, vocabulary)
        return {**scores, "flags": [*scores["flags"], *echoes]}
    prompt = judging.prompt("object_halbench")
    prompts = {
        f"{number}/{image}": prompt.fill(answer=text)
        for number, (image, text) in enumerate(pairs, 1)
        if not short(text)
    }
    lists = {key: phrases(reply) for key, reply in judge.replies(prompts).items()}
    listed = [
        ". ".join(f"a {phrase}" for phrase in lists.get(f"{number}/{image}") or ())
        for number, (image, _) in enumerate(pairs, 1)
    ]
    scores = score(pairs, objects, vocabulary, listed)
    scores["flags"] += echoes
    if unread := [*lists.values()].count(None):
        scores["flags"].append(f"{unread} replies of the judge hold no list: they name no object")
    return {**scores, **judging.named(prompt)}


def phrases(reply: str) -> list[str] | None:
    """The JSON list of strings in a judge's reply, whatever stands around it; None if none does."""
    try:
        names = json.loads(reply[reply.index("[") : reply.rindex("]") + 1])
    except ValueError:
        return None
    return names if all(isinstance(phrase, str) for phrase in names) else None


class ObjectHalBench(Benchmark):
    """Scored from files only."""

    name = "object-halbench"
    score_files = staticmethod(score_files)
