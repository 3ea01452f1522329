"""Every family against the literal reference: all methods together, a left-padded batch, new
tokens from the cache.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_patch
from eval.families_build import CLASSES, build
from eval.families_prompts import FORMS, Inputs, around, image_id, prompt
from eval.families_sizes import BOS, EOS, IMAGE, PAD, VIDEO, VISION_START
from tests.reference import Gift, Hooked, Method, Sample, Turn, Var, Vhr, trace
from vlm_patch import GIFT, VAR, VHR

STEPS = 3
CLOSE = 1e-5
SPECIAL_TOKENS = [PAD, BOS, EOS, VISION_START, VIDEO, IMAGE, 11, 21]
"""Not generated, since the reference would read them as padding or image."""
TEXT_PART = {
    "blip-2": "language_model",
    "instructblip": "language_model",
    "instructblipvideo": "language_model",
    "kosmos-2": "text_model",
    "kosmos-2.5": "text_model",
}


class Family:
    """A tiny model of a type, its prompts, and each of them alone for the reference."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, build(kind)
        self.batch = next(self._prompts())
        separators = getattr(self.model.config, "visual_indicator_token_ids", ())
        self.image_ids = torch.tensor([image_id(kind, self.model), *separators])

    def _prompts(self) -> Iterator[Inputs]:
        for form in FORMS:
            try:
                self.model.generate(**prompt(self.kind, self.model, 0, form), max_new_tokens=1)
            except Exception:
                continue
            self.form = form
            yield prompt(self.kind, self.model, 0, form)

    def generate(self) -> tuple[Tensor, Tensor]:
        """Logits `[2, STEPS, V]` and tokens `[2, STEPS]` of a greedy generation."""
        output = self.model.generate(
            **prompt(self.kind, self.model, 0, self.form),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            suppress_tokens=SPECIAL_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits, 1), output.sequences[:, -STEPS:]

    def row(self, index: int) -> Tensor:
        """Token ids of one prompt, without padding."""
        return self.batch["input_ids"][index][self.batch["attention_mask"][index].bool()]

    def sample(self, index: int, new: Tensor) -> Sample:
        """One prompt with its generated tokens, as the reference sees it."""
        ids = self.row(index)
        image = torch.isin(ids, self.image_ids)
        after = image.flip(0).cumsum(0).flip(0) == 0
        whole = torch.cat([ids, new])
        image = torch.cat([image, torch.zeros(len(new), dtype=torch.bool)])
        turn = Turn(0, len(ids), after, after)
        return Sample(whole, torch.arange(len(whole)), image, (turn,))

    def alone(self, index: int) -> Hooked:
        def run(ids: Tensor) -> Tensor:
            inputs = around(self.kind, self.model, ids[None])
            image = ids == image_id(self.kind, self.model)
            if not image.any():
                return self._text(inputs)
            if self.kind == "paligemma":
                inputs["token_type_ids"][:, len(self.row(index)) :] = 1
            images = {k: v for k, v in self.batch.items() if k not in inputs}
            return self.model(**inputs, **_pick(images, index)).logits[0]

        depth = self.model.config.get_text_config().num_hidden_layers
        return Hooked(self.model, run, depth)

    def _text(self, inputs: Inputs) -> Tensor:
        """The model on text alone; some have an inner model that must be asked."""
        part = TEXT_PART.get(self.kind)
        if part is None:
            return self.model(**inputs).logits[0]
        asked = getattr(self.model, part)
        return asked(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]


def _pick(value: Any, index: int) -> Any:
    """What belongs to one image, out of what belongs to two."""
    if isinstance(value, Tensor):
        return value[index : index + 1]
    if isinstance(value, dict):
        picked = type(value)()
        for key, part in value.items():
            picked[key] = part if key == "visual_indicator_features" else _pick(part, index)
        return picked
    if isinstance(value, list) and all(isinstance(part, Tensor) for part in value):
        return [value[index]]
    if isinstance(value, list | tuple):
        return [_pick(part, index) for part in value]
    return value
