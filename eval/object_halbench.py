"""Object HalBench: CHAIR as RLHF-V reports it, over the objects that a response names once.

Yu et al. 2023, https://arxiv.org/abs/2312.00849. One response: `{"image_id": 397133, "answer":
"A man stands in a kitchen ..."}`. Published numbers let GPT-3.5 list the objects of a response and
spaCy lemmatise them; here they are found by CHAIR's rules in the benchmark's own synonyms, so a
number is comparable with others of this scorer, not with published ones, nor with CHAIR.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import chair
from eval.coco import Vocabulary
from eval.errors import EvalError
from eval.intervals import Numbers, measure
from eval.scoring import read_captions

SHORT = 3


def score(
    responses: Sequence[tuple[int, str]],
    truth: Mapping[int, Collection[str]],
    vocabulary: Vocabulary,
    seed: int = 0,
) -> dict[str, Any]:
    """Response-level and mention-level hallucination of (image id, response) pairs, as shares.

    The response level divides by the responses that name an object at all (`CHAIRs_refine`); each
    object counts once a response. Responses of three words or fewer name nothing.
    """
    if not responses:
        raise EvalError("Object HalBench: there are no responses to score.")
    rows = [_counts(text, truth[image], vocabulary) for image, text in responses]
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    measured = measure(columns, _ratios, seed)
    return {
        **measured["values"],
        "counts": {name: int(column.sum()) for name, column in columns.items()},
        "intervals": measured["intervals"],
        "objects_by": "rules",
        "rules": vocabulary.rules,
        "vocabulary": vocabulary.name,
        "flags": [
            f"{name}: nothing to divide by, 0 by definition" for name in measured["undefined"]
        ],
    }


def _counts(text: str, truth: Collection[str], vocabulary: Vocabulary) -> dict[str, int]:
    judged = chair.judge("" if len(text.split()) <= SHORT else text, truth, vocabulary)
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
    responses: Path, truth: Path, synonyms: Path | None = None, rules: str = "pattern"
) -> dict[str, Any]:
    """Of a response file, against an objects file or a COCO folder.

    `synonyms` is the benchmark's list (`synonyms_refine.txt`); None is the vocabulary that ships.
    """
    vocabulary = Vocabulary.load(synonyms, rules)
    pairs, objects = read_captions(responses, truth, vocabulary)
    return score(pairs, objects, vocabulary)
