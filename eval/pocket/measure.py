"""Responses of a pocket model to scenes, and how often they are right; used while training.

The published numbers are those of CHAIR and POPE in `eval.pocket.report`; these are stand-ins.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.pocket import CAPTION_PROMPT, pope_question
from eval.pocket.scenes import NAMES, Scene, render, scene, stream

MAX_NEW_TOKENS = 120


def prompt(processor: Any, text: str) -> str:
    """One user turn with a picture, ready for the answer."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    rendered: str = processor.apply_chat_template(chat, add_generation_prompt=True)
    return rendered


@torch.no_grad()
def respond(
    model: Any,
    processor: Any,
    images: list[Image.Image],
    texts: list[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch: int = 64,
) -> list[str]:
    """Greedy responses, one per picture and text; one that is cut by the limit has no "</s>"."""
    responses: list[str] = []
    for at in range(0, len(texts), batch):
        questions = [prompt(processor, text) for text in texts[at : at + batch]]
        inputs = processor(
            text=questions, images=images[at : at + batch], padding=True, return_tensors="pt"
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        responses += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :])
    return [text.replace("<pad>", "").strip() for text in responses]


def mentions(text: str) -> list[str]:
    """The world's objects named in a text, in order, with repeats."""
    named = [(at, name) for name in NAMES for at in _positions(f" {name}", text)]
    return [name for _, name in sorted(named)]


def _positions(word: str, text: str) -> list[int]:
    ends = (" ", ".", ",")
    return [
        at
        for at in range(len(text))
        if text.startswith(word, at) and text[at + len(word) : at + len(word) + 1] in ends
    ]


@dataclass(frozen=True)
class Quick:
    """Shares from 0 to 1."""

    chair_i: float
    recall: float
    yes_no: float
    ended: float

    @property
    def score(self) -> float:
        """What training is stopped by: the mean of the captions' F1 and the yes/no accuracy."""
        precision = 1 - self.chair_i
        return (2 * precision * self.recall / max(precision + self.recall, 1e-9) + self.yes_no) / 2


def random_pairs(views: list[Scene]) -> list[tuple[int, str, bool]]:
    """Scene number, object and truth: per scene two present and two absent objects by chance."""
    rows = []
    for at, view in enumerate(views):
        rng = stream(view.split, view.index, 5)
        absent = tuple(name for name in NAMES if name not in view.names)
        for names, truth in ((view.names, True), (absent, False)):
            rows += [(at, names[i], truth) for i in rng.permutation(len(names))[:2]]
    return rows


def quick(model: Any, processor: Any, split: str, count: int) -> Quick:
    """CHAIR_I, recall, accuracy on random pairs and the share of captions that end, on a split."""
    views = [scene(split, index) for index in range(count)]
    images = [render(view) for view in views]
    responses = respond(model, processor, images, [CAPTION_PROMPT] * count)
    named = [mentions(text) for text in responses]
    both = list(zip(views, named, strict=True))
    wrong = sum(name not in view.names for view, names in both for name in names)
    recalled = sum(name in names for view, names in both for name in view.names)
    pairs = random_pairs(views)
    questions = [pope_question(name) for _, name, _ in pairs]
    answers = respond(model, processor, [images[at] for at, _, _ in pairs], questions, 3)
    right = [a.startswith("Yes") == truth for a, (_, _, truth) in zip(answers, pairs, strict=True)]
    return Quick(
        chair_i=wrong / max(1, sum(len(names) for names in named)),
        recall=recalled / sum(len(view.names) for view in views),
        yes_no=float(np.mean(right)),
        ended=float(np.mean([text.endswith("</s>") for text in responses])),
    )
