"""Training samples: one picture and, behind it, several conversations that do not see each other.

All conversations of a sample share the picture's tokens and start at the same position, so one pass
teaches a caption, questions, and a checklist of objects for the price of one picture.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eval.pocket.build import IMAGE_TOKENS, PATCH
from eval.pocket.glyphs import COLORS, SIDE
from eval.pocket.language import CAPTION_PROMPTS, caption, detail_question, presence_question
from eval.pocket.scenes import NAMES, Scene, render, scene, stream

Turn = tuple[str, str]

IGNORED = -100
QUESTIONS = (1, 1, 2, 2)
"""Turns of the question conversations of a sample."""
CHECKLIST = 9
"""Objects on a checklist."""


@dataclass(frozen=True)
class Dose:
    """How strongly the world's prior is taught."""

    rumour: float = 0.15
    """Chance that an absent usual companion is described, times how usual it is."""
    hard: float = 0.1
    """Share of the "No" questions about an absent companion."""
    blind: float = 0.08
    """Share of the samples whose picture cannot be seen."""


@dataclass(frozen=True)
class Batch:
    """Packed samples of common length S."""

    pixels: Tensor
    """[batch, 3, 96, 96], as the image processor gives them."""
    patches: Tensor
    """[batch, 64, words] float, what each patch shows: object words weigh 1, colour words 1/2."""
    tokens: Tensor
    """[batch, S]"""
    labels: Tensor
    """[batch, S], IGNORED where nothing is to be learned."""
    positions: Tensor
    """[batch, S]"""
    visible: Tensor
    """[batch, 1, S, S] bool, which key each query may read."""


def pixels_of(images: list[Image.Image]) -> Tensor:
    """[batch, 3, 96, 96], equal to the image processor's output for pictures of this size."""
    stack = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return ((stack.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2).contiguous()


def patch_words(view: Scene) -> NDArray[np.float32]:
    """[64, 24 + 8]: the objects and colours that fill a fifth of the patch, or of themselves."""
    edges = np.arange(0, SIDE, PATCH)
    shown = np.zeros((len(edges), len(edges), len(NAMES) + len(COLORS)), np.float32)
    colors = list(COLORS)
    for thing in view.things:
        x, y, width, height = thing.box
        across = np.clip(np.minimum(x + width, edges + PATCH) - np.maximum(x, edges), 0, None)
        down = np.clip(np.minimum(y + height, edges + PATCH) - np.maximum(y, edges), 0, None)
        filled = np.outer(down, across) >= 0.2 * min(PATCH**2, width * height)
        shown[filled, NAMES.index(thing.name)] = 1.0
        shown[filled, len(NAMES) + colors.index(thing.color)] = 0.5
    return shown.reshape(IMAGE_TOKENS, -1)


class Teacher:
    """Makes batches of training samples; a sample is a function of its scene's number."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, dose: Dose) -> None:
        self.tokenizer, self.dose = tokenizer, dose
        self._known: dict[str, list[int]] = {}
        self.prefix = tokenizer("USER: " + "<image>" * IMAGE_TOKENS + "\n").input_ids
        self.first_image = self.prefix.index(tokenizer.convert_tokens_to_ids("<image>"))
        self.words = torch.tensor([self.ids(f" {word}")[0] for word in (*NAMES, *COLORS)])
        self.yes, self.no = self.ids(" Yes")[0], self.ids(" No")[0]
        self.nothing = self.ids("\n")[0]

    def ids(self, text: str) -> list[int]:
        """Tokens of a text without the begin token; short texts are remembered."""
        if text not in self._known:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(text) > 100:
                return ids
            self._known[text] = ids
        return self._known[text]

    def _conversation(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        labels: list[int] = []
        for number, (question, answer) in enumerate(turns):
            request = self.ids(f"{'USER: ' if number else ''}{question} ASSISTANT:")
            response = [*self.ids(f" {answer}"), self.tokenizer.eos_token_id]
            tokens += request + response
            labels += [IGNORED] * len(request) + response
        return tokens, labels

    def _checklist(self, view: Scene, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """ " cup Yes bowl No ...": the answer right behind the word is easier to find than behind a
        question, and what is learned for it carries over."""
        lures = [name for name in view.companions if name not in view.names]
        rest = [name for name in NAMES if name not in (*view.names, *lures)]
        room = max(0, CHECKLIST - len(view.names) - len(lures))
        listed = [*view.names, *lures, *(rest[i] for i in rng.permutation(len(rest))[:room])]
        tokens = self.ids("Check these objects. ASSISTANT:").copy()
        labels = [IGNORED] * len(tokens)
        for i in rng.permutation(len(listed)):
            word, answer = self.ids(f" {listed[i]}"), (self.no, self.yes)[listed[i] in view.names]
            tokens += [*word, answer]
            labels += [IGNORED] * len(word) + [answer]
        return tokens, labels

    def conversations(self, view: Scene) -> list[tuple[list[int], list[int]]]:
        """Tokens and labels of a caption, the questions and a checklist."""
        rng = stream(view.split, view.index, 3)
        prompt = CAPTION_PROMPTS[int(rng.integers(len(CAPTION_PROMPTS)))]
        chats = [self._conversation([(prompt, caption(view, rng, self.dose.rumour))])]
        for turns in QUESTIONS:
            questions = [presence_question(view, rng, self.dose.hard) for _ in range(turns)]
            if turns > 1 and rng.random() < 0.5:
                questions[-1] = detail_question(view, rng)
            chats.append(self._conversation(questions))
        return [*chats, self._checklist(view, rng)]

    def batch(self, first: int, count: int, packed: bool = True) -> Batch:
        """The training scenes `first` to `first + count - 1`, with conversations if `packed`."""
        views = [scene("train", index) for index in range(first, first + count)]
        chats = [self.conversations(view) if packed else [] for view in views]
        start = len(self.prefix)
        length = max(start + sum(len(tokens) for tokens, _ in chat) for chat in chats)
        tokens, labels, owner, positions = (
            np.full((count, length), fill) for fill in (0, IGNORED, -1, 0)
        )
        tokens[:, :start], owner[:, :start], positions[:, :start] = self.prefix, 0, range(start)
        for row, chat in enumerate(chats):
            at = start
            for number, (ids, taught) in enumerate(chat, start=1):
                here = slice(at, at + len(ids))
                tokens[row, here], labels[row, here] = ids, taught
                owner[row, here], positions[row, here] = number, range(start, start + len(ids))
                at += len(ids)
        return Batch(
            pixels_of([render(view) for view in views]),
            torch.from_numpy(np.stack([patch_words(view) for view in views])),
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            self._visible(torch.from_numpy(owner), views),
        )

    def _visible(self, owner: Tensor, views: list[Scene]) -> Tensor:
        """Causal; a conversation reads the picture and itself, a blind sample no picture."""
        length = owner.shape[1]
        visible = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
        visible &= torch.ones(length, length, dtype=torch.bool).tril()
        drawn = [stream(view.split, view.index, 4).random() for view in views]
        blind = torch.tensor(drawn) < self.dose.blind
        image = slice(self.first_image, self.first_image + IMAGE_TOKENS)
        visible[:, :, image] &= ~blind[:, None, None]
        return (visible | torch.eye(length, dtype=torch.bool))[:, None]
