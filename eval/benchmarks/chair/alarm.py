"""The degeneration alarm: CHAIR falls for free when a model falls silent or repeats itself.

Captions that name nothing count as free of hallucination, and a loop names no new object. The
limits lie far from published captions of LLaVA-1.5 and InstructBLIP (asked for detail, at most 2 %
name nothing and none loops; asked for one line, 11 % name nothing) and well below what degenerate
runs show (37 to 46 % of captions looping are on record). Where CHAIR_S and CHAIR_I are both above
those of every stock model whose captions are published (59 and 24 % at most), nothing rings.
"""

from collections.abc import Mapping

LIMITS = {
    "silence": ("no_object_share", 0.2, "name no object"),
    "looping": ("looping_share", 0.1, "repeat themselves"),
}
LOW = {"chair_s": 0.6, "chair_i": 0.25}
"""Below one of these CHAIR is low enough to be taken for a gain."""


def ringing(shares: Mapping[str, float]) -> dict[str, str]:
    """What rings (silence, looping) with the sentence that says why; empty for a healthy run."""
    if all(shares[key] >= high for key, high in LOW.items()):
        return {}
    chair = f"CHAIR_S {100 * shares['chair_s']:.1f} %, CHAIR_I {100 * shares['chair_i']:.1f} %"
    return {
        name: f"degeneration alarm, {name}: {100 * shares[key]:.1f} % of the captions {does}, "
        f"so {chair} cannot be read as an improvement"
        for name, (key, least, does) in LIMITS.items()
        if shares[key] >= least
    }
