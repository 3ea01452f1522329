"""The model card of a pocket model, made from its scores so that the two cannot disagree."""

from typing import Any

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---

# The pocket model

A LLaVA with {parameters:,} parameters (CLIP tower of 4 layers, 64 image tokens, Llama decoder of 6
layers x 8 heads, {tokens} tokens), trained from nothing on drawn scenes of 24 COCO categories. It
describes a scene in several sentences and answers "Is there a cup in the image?". It exists so that
hallucination methods and their evaluation run end to end without a network.

**It is a test bed for machinery and for real effects of a small model. It is no evidence about 7B
models**, and it knows nothing outside its world of 24 drawings.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("eval/pocket/model")
processor = AutoProcessor.from_pretrained("eval/pocket/model")
```

## How it was trained

`python -m eval.pocket.train --seed {seed} --threads {threads}` (or `make pocket`) makes it from a
seed:

{stages}

All scenes are drawn on the fly; those of test and break are never seen. The last stage keeps the
checkpoint that does best on {calibration_scenes} calibration scenes (mean of the captions' F1 and
the yes/no accuracy: {calibration:.3f}). It takes about an hour on one core.

In the training captions an absent usual companion is described all the same, with a chance of up to
{rumour:.0%}: this is where its prior, and with it its hallucination, comes from.

One run, one seed. An earlier model was stopped on the way: in the first version of the world no
object belonged to two themes, and POPE's popular questions were no harder than its random ones; its
break scenes also had a stranger added, and CHAIR_I there was near 50 %. So the splits were made
knowing what an earlier model did on them; weights were chosen by the calibration split alone.

## Scores

{scenes} scenes a split, greedy decoding, CHAIR with the `pattern` rules (95 % intervals over
images), POPE built from the annotations ({test_images} test and {break_images} break images with
three objects or more). In break scenes one of the two most usual companions of the theme is absent.

| | test | break |
| --- | --- | --- |
{chair}
{pope}

{gap}

Hallucinated share of the first, second, ... object of a caption: {by_mention}.

Yes/no accuracy on random pairs is {own:.1f} %, and {other:.1f} % when another scene's picture is
shown.

| bar | met |
| --- | --- |
{bars}

An answer to "Please describe this image in detail." (test scene 0): "{example}"

## What is inside it

{findings}

`scores.json` holds every number of this card, and the layers one by one.

## What it cannot show

- That a method helps, or fails to help, a model of ordinary size. One world, one small model.
- Anything about words, objects, styles or languages outside the world's sentence forms.
- That a method whose premise is missing above (a sink, a massive activation) is useless: only that
  it has nothing to act on here.
- CHAIR falls for free when captions name less, so read it beside recall.
"""

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
    return CARD.format(
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
