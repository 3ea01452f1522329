"""Score a pocket model with CHAIR and POPE and write its card: `python -m eval.pocket.report`.

Everything is measured on the test and break splits, which training never sees.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks import chair, pope
from eval.benchmarks.coco import Vocabulary
from eval.pocket import CAPTION_PROMPT, MODEL, pope_question
from eval.pocket.anatomy import anatomy, findings, rows
from eval.pocket.card import card
from eval.pocket.language import well_formed
from eval.pocket.measure import random_pairs, respond
from eval.pocket.scenes import Scene, render, scene
from eval.pocket.world import VERSION, file_name, image_id
from vlm_patch.models import chat

SCENES = 300
SCORED = ("test", "break")


def _captions(views: list[Scene], responses: list[str]) -> dict[str, Any]:
    texts = [text.removesuffix("</s>").strip() for text in responses]
    vocabulary = Vocabulary.load()
    pairs = [(image_id(view), text) for view, text in zip(views, texts, strict=True)]
    scored = chair.score(pairs, {image_id(view): view.names for view in views}, vocabulary)
    kept = ("chair_s", "chair_i", "recall", "precision", "f1", "mean_tokens")
    judged = [
        [name not in view.names for _, name in vocabulary.mentions(text)]
        for view, text in zip(views, texts, strict=True)
    ]
    by_mention = [[wrong[at] for wrong in judged if len(wrong) > at] for at in range(6)]
    return {
        **{key: round(float(scored[key]), 4) for key in kept},
        "chair_i_interval": [round(float(v), 4) for v in scored["intervals"]["chair_i"]],
        "ended": round(float(np.mean([text.endswith("</s>") for text in responses])), 4),
        "well_formed": round(float(np.mean([well_formed(text) for text in texts])), 4),
        "wrong_by_mention": [round(float(np.mean(w)), 3) for w in by_mention if len(w) >= 20],
    }


def _polls(model: Any, processor: Any, views: list[Scene]) -> dict[str, Any]:
    named = {file_name(view): view for view in views}
    objects = {name: [thing.name for thing in view.things] for name, view in named.items()}
    enough = sum(len(things) >= 3 for things in objects.values())
    scores: dict[str, Any] = {"images": enough}
    for strategy in pope.STRATEGIES:
        questions = pope.build_questions(objects, strategy, images=enough)
        images = [render(named[question.image]) for question in questions]
        responses = respond(model, processor, images, [q.text for q in questions], 4)
        texts = [text.removesuffix("</s>").strip() for text in responses]
        scored = pope.score(texts, [q.label for q in questions], [q.image for q in questions])
        kept = ("accuracy", "f1", "yes_ratio", "unreadable")
        scores[strategy] = {key: round(float(scored[key]), 4) for key in kept}
        span = scored["intervals"]["accuracy"]
        scores[strategy]["accuracy_interval"] = [round(float(v), 4) for v in span]
    return scores


def _image_use(model: Any, processor: Any, views: list[Scene]) -> dict[str, float]:
    """Yes/no accuracy on random pairs, with the scene's picture and with the next scene's."""
    pairs = random_pairs(views)
    texts = [pope_question(name) for _, name, _ in pairs]
    truth = [present for _, _, present in pairs]

    def accuracy(shift: int) -> float:
        images = [render(views[(at + shift) % len(views)]) for at, _, _ in pairs]
        responses = respond(model, processor, images, texts, 4)
        right = [a.startswith("Yes") == t for a, t in zip(responses, truth, strict=True)]
        return round(float(np.mean(right)), 4)

    return {"own_image": accuracy(0), "other_image": accuracy(1)}


def bars(scores: dict[str, Any]) -> dict[str, bool]:
    """What the model was to reach, and whether it does."""
    use, polls = scores["image_use"], scores["splits"]["test"]["pope"]
    held = {split: scores["splits"][split]["chair"] for split in SCORED}
    ranks = [polls[strategy]["accuracy"] for strategy in ("random", "popular", "adversarial")]
    return {
        "yes/no accuracy on random pairs at least 75 %": use["own_image"] >= 0.75,
        "another scene's image costs at least 15 points": use["own_image"] - use["other_image"]
        >= 0.15,
        "POPE random > popular > adversarial": ranks[0] > ranks[1] > ranks[2],
        "CHAIR_I on break between 8 % and 40 %": 0.08 <= held["break"]["chair_i"] <= 0.40,
        "recall at least 50 % on both splits": min(h["recall"] for h in held.values()) >= 0.5,
        "99 % of the captions end within 120 tokens": min(h["ended"] for h in held.values())
        >= 0.99,
        "95 % of the captions are well formed": min(h["well_formed"] for h in held.values())
        >= 0.95,
    }


def report(folder: Path, scenes: int = SCENES) -> dict[str, Any]:
    """All scores of the model in a folder, as JSON."""
    # eager attention, whose weights can be read
    model, processor = chat.load(str(folder), {}, dtype="float32", attn_implementation="eager")
    scores: dict[str, Any] = {"world": VERSION, "scenes": scenes, "splits": {}}
    scores["parameters"] = sum(p.numel() for p in model.parameters())
    scores["tokens"] = len(processor.tokenizer)
    for split in SCORED:
        views = [scene(split, index) for index in range(scenes)]
        images = [render(view) for view in views]
        responses = respond(model, processor, images, [CAPTION_PROMPT] * scenes)
        scores["splits"][split] = {
            "chair": _captions(views, responses),
            "pope": _polls(model, processor, views),
            "example": responses[0].removesuffix("</s>").strip(),
        }
        if split == "test":
            scores["image_use"] = _image_use(model, processor, views)
    layers = anatomy(model, processor)
    scores["findings"] = findings(layers, model.config.text_config.hidden_size)
    scores["anatomy"] = rows(layers)
    scores["bars"] = bars(scores)
    return scores


def publish(folder: Path, training: dict[str, Any], scenes: int = SCENES) -> str:
    """Score the model, write scores.json and the card beside it, and return the card."""
    scores = report(folder, scenes) | {"training": training}
    text = card(scores)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Score a model again; what is known of its training is kept."""
    parser = argparse.ArgumentParser(prog="python -m eval.pocket.report", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--scenes", type=int, default=SCENES)
    chosen = parser.parse_args()
    known = chosen.model / "scores.json"
    if not known.is_file():
        raise SystemExit(f"{known} is missing: python -m eval.pocket.train writes it first")
    training = json.loads(known.read_text(encoding="utf-8"))["training"]
    print(publish(chosen.model, training, chosen.scenes))


if __name__ == "__main__":
    main()
