"""The model card of a pocket model, made from its scores so that the two cannot disagree."""

from pathlib import Path
from typing import Any

CARD = Path(__file__).parent / "card.md"
"""The card with places for the numbers."""

_CHAIR = {
    "chair_i": ("CHAIR_I", "%"),
    "chair_s": ("CHAIR_S", "%"),
    "recall": ("recall", "%"),
    "f1": ("F1", "%"),
    "mean_tokens": ("words and stops in a caption", ""),
    "ended": ("captions that end", "%"),
    "well_formed": ("captions whose every sentence is well formed", "%"),
}


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _span(interval: list[float]) -> str:
    low, high = interval
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _chair(splits: dict[str, Any]) -> str:
    lines = []
    for key, (name, unit) in _CHAIR.items():
        values = [splits[split]["chair"][key] for split in ("test", "break")]
        cells = [f"{100 * v:.1f} %" if unit else f"{v:.1f}" for v in values]
        if key == "chair_i":
            spans = [splits[split]["chair"]["chair_i_interval"] for split in ("test", "break")]
            cells = [f"{c} {_span(span)}" for c, span in zip(cells, spans, strict=True)]
        lines.append(_row(name, cells))
    return "\n".join(lines)


def _pope(splits: dict[str, Any]) -> str:
    lines = []
    for strategy in ("random", "popular", "adversarial"):
        polls = [splits[split]["pope"][strategy] for split in ("test", "break")]
        cells = [
            f"{100 * p['accuracy']:.1f} % {_span(p['accuracy_interval'])} / {100 * p['f1']:.1f} %"
            for p in polls
        ]
        lines.append(_row(f"POPE {strategy}, accuracy / F1", cells))
    return "\n".join(lines)


def _gap(splits: dict[str, Any]) -> str:
    close = []
    for split in ("test", "break"):
        polls = splits[split]["pope"]
        if polls["random"]["accuracy"] <= polls["popular"]["accuracy_interval"][1]:
            close.append(split)
    gap = (
        f"POPE's random and popular accuracy differ by less than the intervals: {', '.join(close)}."
    )
    return gap if close else "POPE's random and popular accuracy differ by more than the intervals."


def _by_mention(splits: dict[str, Any]) -> str:
    parts = []
    for split in ("test", "break"):
        shares = splits[split]["chair"]["wrong_by_mention"]
        parts.append(f"{', '.join(f'{100 * share:.0f} %' for share in shares)} ({split})")
    return "; ".join(parts)


def card(scores: dict[str, Any]) -> str:
    """The README.md of a model folder."""
    splits, training, use = scores["splits"], scores["training"], scores["image_use"]
    return CARD.read_text(encoding="utf-8").format(
        parameters=scores["parameters"],
        tokens=scores["tokens"],
        seed=training["seed"],
        threads=training["threads"],
        stages="\n".join(
            f"- *{stage['name']}*: {stage['steps']} steps of {stage['batch']} scenes, "
            f"learning rate {stage['rate']:g}{', falling' if stage['falling'] else ''}"
            for stage in training["stages"]
        ),
        calibration_scenes=training["calibration_scenes"],
        calibration=training["calibration"],
        rumour=training["rumour"],
        scenes=scores["scenes"],
        test_images=splits["test"]["pope"]["images"],
        break_images=splits["break"]["pope"]["images"],
        chair=_chair(splits),
        pope=_pope(splits),
        gap=_gap(splits),
        by_mention=_by_mention(splits),
        own=100 * use["own_image"],
        other=100 * use["other_image"],
        bars="\n".join(_row(bar, ["yes" if met else "no"]) for bar, met in scores["bars"].items()),
        example=splits["test"]["example"],
        findings="\n".join(f"- {finding}" for finding in scores["findings"]),
    )
