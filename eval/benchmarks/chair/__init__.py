"""CHAIR: how many of the objects that a caption names are not in the image.

Rohrbach et al. 2018, https://arxiv.org/abs/1809.02156, by the original rules (`pattern`) or those
of OPERA's fork (`wordnet`); each needs a truth that was read by the same rules.
One row of a caption file: `{"image_id": 10822, "caption": "3 zebras in a field"}`.

CHAIR falls for free when captions get shorter, loop, or repeat a true object, so recall, length,
repetition and the share of captions that name nothing always stand beside it.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from eval.benchmarks.chair import alarm
from eval.benchmarks.coco import Vocabulary
from eval.benchmarks.intervals import Numbers, measure
from eval.errors import EvalError

LENGTHS = (40, 60, 100)
"""CHAIR is also taken of the first so many words."""
LOOPING = 0.7
"""Captions of LLaVA-1.5 and InstructBLIP that do not loop have at least 0.8 of 4-grams distinct."""


@dataclass(frozen=True)
class Counts:
    """What one caption adds to the corpus: integers, named as the published raw counts."""

    captions: int
    captions_hallucinated: int
    object_mentions: int
    object_mentions_hallucinated: int
    gt_objects: int
    gt_objects_recalled: int
    distinct_objects_mentioned: int
    tokens: int
    captions_without_objects: int


@dataclass(frozen=True)
class CaptionScore:
    """The score of one caption; pairs are (word, COCO object) in order of mention.

    mentions: all pairs
    hallucinated: those whose object is not in the image
    missed: objects of the image that the caption does not name
    counts: what it adds to the corpus
    four_grams: number of its 4-grams
    distinct_four_grams: number of different ones
    """

    mentions: tuple[tuple[str, str], ...]
    hallucinated: tuple[tuple[str, str], ...]
    missed: tuple[str, ...]
    counts: Counts
    four_grams: int
    distinct_four_grams: int

    @property
    def objects(self) -> list[str]:
        return [name for _, name in self.mentions]

    @property
    def tokens(self) -> int:
        return self.counts.tokens

    @property
    def loops(self) -> bool:
        """Whether the text repeats itself: under LOOPING of its 4-grams are distinct."""
        return self.distinct_four_grams < LOOPING * self.four_grams


def judge(caption: str, truth: Collection[str], vocabulary: Vocabulary) -> CaptionScore:
    """Mentions of a caption, and which of them are not in `truth` (the objects of its image)."""
    reading = vocabulary.read(caption)
    hallucinated = tuple(mention for mention in reading.mentions if mention[1] not in truth)
    named, present = {name for _, name in reading.mentions}, set(truth)
    four_grams = [reading.tokens[i : i + 4] for i in range(len(reading.tokens) - 3)]
    counts = Counts(
        captions=1,
        captions_hallucinated=int(bool(hallucinated)),
        object_mentions=len(reading.mentions),
        object_mentions_hallucinated=len(hallucinated),
        gt_objects=len(present),
        gt_objects_recalled=len(named & present),
        distinct_objects_mentioned=len(named),
        tokens=len(reading.tokens),
        captions_without_objects=int(not named),
    )
    return CaptionScore(
        mentions=reading.mentions,
        hallucinated=hallucinated,
        missed=tuple(sorted(present - named)),
        counts=counts,
        four_grams=len(four_grams),
        distinct_four_grams=len(set(four_grams)),
    )


def score(
    captions: Sequence[tuple[int, str]],
    truth: Mapping[int, Collection[str]],
    vocabulary: Vocabulary,
    rules: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """CHAIR of (image id, caption) pairs, as one JSON-able dictionary. Shares lie in [0, 1].

    `rules` None: those of the vocabulary. Intervals (95 %) are bootstrapped over captions. A ratio
    whose denominator is 0 is 0 and is named in `flags`. `EvalError` if there are no captions, an
    image is not in `truth`, or the rules are unknown.
    """
    vocabulary = replace(vocabulary, rules=rules or vocabulary.rules)
    if not captions:
        raise EvalError("CHAIR: there are no captions to score.")
    _require_truth([image for image, _ in captions], truth)
    columns = counts_by_caption(captions, truth, vocabulary)
    measured = measure(columns, ratios, seed)
    return {
        "n": len(captions),
        **measured["values"],
        "counts": {f.name: int(columns[f.name].sum()) for f in fields(Counts)},
        "intervals": measured["intervals"],
        "rules": vocabulary.rules,
        "vocabulary": vocabulary.name,
        "alarms": [*alarm.ringing(measured["values"]).values()],
        "flags": _flags(captions, truth, vocabulary, measured["undefined"]),
    }


def counts_by_caption(
    captions: Sequence[tuple[int, str]],
    truth: Mapping[int, Collection[str]],
    vocabulary: Vocabulary,
) -> dict[str, Numbers]:
    """What each caption adds to the corpus, by name of the count: `[captions]` each.

    `NAME_at_40` is the count of the caption's first 40 words: captions of equal length, so that
    nothing is gained by stopping early.
    """
    whole = [judge(caption, truth[image], vocabulary) for image, caption in captions]
    columns = _columns(whole)
    columns["four_grams"] = np.array([s.four_grams for s in whole])
    columns["distinct_four_grams"] = np.array([s.distinct_four_grams for s in whole])
    columns["captions_looping"] = np.array([s.loops for s in whole])
    for length in LENGTHS:
        cut = [
            judged
            if len(words := caption.split()) <= length
            else judge(" ".join(words[:length]), truth[image], vocabulary)
            for judged, (image, caption) in zip(whole, captions, strict=True)
        ]
        columns |= {f"{name}_at_{length}": column for name, column in _columns(cut).items()}
    return columns


def _columns(scores: Sequence[CaptionScore]) -> dict[str, Numbers]:
    return {f.name: np.array([getattr(s.counts, f.name) for s in scores]) for f in fields(Counts)}


def ratios(c: Mapping[str, Numbers]) -> dict[str, tuple[Numbers, Numbers]]:
    """The formulas of CHAIR; over the corpus, not averaged over captions.

    `chair_i_distinct` takes each object once per caption, so repeating a true one gains nothing.
    """
    distinct, recalled = c["distinct_objects_mentioned"], c["gt_objects_recalled"]
    result = {
        **_chair(c, ""),
        "precision": (recalled, distinct),
        "f1": (2 * recalled, distinct + c["gt_objects"]),
        "mean_tokens": (c["tokens"], c["captions"]),
        "chair_i_distinct": (distinct - recalled, distinct),
        "no_object_share": (c["captions_without_objects"], c["captions"]),
        "distinct_4gram_share": (c["distinct_four_grams"], c["four_grams"]),
        "looping_share": (c["captions_looping"], c["captions"]),
    }
    for length in LENGTHS:
        result |= _chair(c, f"_at_{length}")
    return result


def _chair(c: Mapping[str, Numbers], cut: str) -> dict[str, tuple[Numbers, Numbers]]:
    """CHAIR_S, CHAIR_I and recall of whole captions, or of their first words."""
    return {
        f"chair_s{cut}": (c[f"captions_hallucinated{cut}"], c["captions"]),
        f"chair_i{cut}": (c[f"object_mentions_hallucinated{cut}"], c[f"object_mentions{cut}"]),
        f"recall{cut}": (c[f"gt_objects_recalled{cut}"], c["gt_objects"]),
    }


def _require_truth(images: Sequence[int], truth: Mapping[int, Collection[str]]) -> None:
    missing = sorted({image for image in images if image not in truth})
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise EvalError(
            f"the truth holds no image {shown} ({len(missing)} of {len(set(images))} images are "
            f"missing; it has {len(truth)}). Score against the annotations of the images that were "
            "captioned."
        )


def _flags(
    captions: Sequence[tuple[int, str]],
    truth: Mapping[int, Collection[str]],
    vocabulary: Vocabulary,
    undefined: Sequence[str],
) -> list[str]:
    """What a reader of the numbers should know about them."""
    flags = [
        f"{name}: nothing to divide by, 0 by definition" for name in undefined if "_at_" not in name
    ]
    repeated = sum(times > 1 for times in Counter(image for image, _ in captions).values())
    if repeated:
        flags.append(f"{repeated} images have more than one caption; each counts")
    shown = {name for image, _ in captions for name in truth[image]}
    if unknown := sorted(shown - vocabulary.objects):
        flags.append(f"objects of the truth that the vocabulary has no word for: {unknown}")
    return flags
