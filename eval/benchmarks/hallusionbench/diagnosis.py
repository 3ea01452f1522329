"""Why a model fails on HallusionBench: it follows what it has read, or misreads what it sees.

The decision tree of Guan et al. 2023, https://arxiv.org/abs/2310.14566, as the official script has
it. Each question is held against its first form, on figure 0: the original figure (VD, visual
dependent), or no figure at all (VS, visual supplement).
"""

WRONG, RIGHT, UNCLEAR = 0, 1, 2
LANGUAGE, VISUAL, MIXED = "language_hallucination", "visual_illusion", "mixed"
KINDS = (LANGUAGE, VISUAL, MIXED)


def diagnose(category: str, verdict: int, first: int | None = None, same: bool = False) -> str:
    """The kind of a failure, or "" where nothing failed.

    `first` is the verdict on the same question's first form, None where this is that form; `same`
    says that both answers say the same. Without a figure an unclear answer is no failure.
    """
    if verdict == RIGHT:
        return ""
    if first is None:
        return VISUAL if category == "VD" else LANGUAGE if verdict == WRONG else ""
    repeated = verdict == WRONG and same
    if category == "VD":
        return MIXED if first == RIGHT and repeated else VISUAL
    if first != WRONG:
        return VISUAL
    return LANGUAGE if repeated else MIXED
