"""A tiny model of any family with its prompts, and each prompt alone for the literal reference."""

from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor

from eval.support.build import CLASSES, build
from eval.support.families import quietly
from eval.support.prompts import FORMS, TAKES_FEATURES, Inputs, around, image_id, prompt
from eval.support.reference import Sample, Turn
from eval.support.sizes import BOS, EOS, IMAGE, PAD, VIDEO, VISION_START
from tests.support.hooked import Hooked

STEPS = 3
INDICATORS = [11, 21]  # of Ovis2, in `eval.support.sizes`
NOT_GENERATED = [PAD, BOS, EOS, VISION_START, VIDEO, IMAGE, *INDICATORS]
"""The reference would read them as padding or image."""
TEXT_PART = {
    "blip-2": "language_model",
    "instructblip": "language_model",
    "instructblipvideo": "language_model",
    "kosmos-2": "text_model",
    "kosmos-2.5": "text_model",
}
"""What answers to text alone, in models that insist on an image."""

STATEFUL = (
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "nemotron_h_omni",
    "qwen3_5",
    "qwen3_5_moe",
)
BREAKS_PADDING = ("hunyuan_vl", "kosmos-2", "kosmos-2.5")
"""The unpatched model answers a padded prompt otherwise than the same prompt alone."""
WITHOUT = {"mllama": ("var", "gift"), "muse_spark": ("vhr",)}
UNSUPPORTED = (
    *("blip", "git", "idefics", "evolla", "mistral4", "pi0", "diffusion_gemma", "dots3_note"),
    *("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"),
    *("glm5_next", "mistral_large4", "qwen4_exp", "gemma3n", "inkling_mm_model", "inkling2"),
)
NEWER = ("inkling2_loop", "hy_v4_vl")
"""Unsupported too, and known to transformers since 5.24."""
BROKEN = {"5.24.0": ("llama4",)}
"""Types whose stock model does not run in a version of transformers, by version."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "paligemma-2": ("paligemma", {"text_config": {"model_type": "gemma2"}}),
    "llava-mistral": ("llava", {"text_config": {"model_type": "mistral"}}),
    "llava-gemma2": ("llava", {"text_config": {"model_type": "gemma2"}}),
    "instructblip-opt": ("instructblip", {"text_config": {"model_type": "opt"}}),
}
WITHOUT_FEATURES = (
    *("aria", "aya_vision", "blip-2", "chameleon", "cohere2_vision", "deepseek_vl", "gemma3"),
    *("got_ocr2", "idefics3", "instructblip", "instructblip-opt", "internvl", "janus", "lfm2_vl"),
    *("llava", "llava-mistral", "llava_next", "llava_next_video", "llava_onevision", "mistral3"),
    *("shieldgemma2", "smolvlm", "vipllava"),
)
"""What can be compared in versions of transformers that take no image features."""
LEFT_OUT = (*UNSUPPORTED, *NEWER, *BROKEN.get(transformers.__version__, ()))
KNOWN = (*CLASSES, *VARIANTS) if TAKES_FEATURES else WITHOUT_FEATURES
KINDS = [kind for kind in KNOWN if kind not in LEFT_OUT]


class Family:
    """A batch of two prompts of different lengths, with an image each."""

    def __init__(self, kind: str, **changes: Any) -> None:
        self.kind, self.model = kind, build(kind, **changes)
        self.form = next(form for form in FORMS if self._takes(form))
        self.batch = self.prompt()
        ids = [image_id(kind, self.model), *(INDICATORS if kind == "ovis2" else ())]
        self.image_ids = torch.tensor(ids)
        self.depth: int = self.model.config.get_text_config().num_hidden_layers

    def _takes(self, form: str) -> bool:
        try:
            self.model.generate(**prompt(self.kind, self.model, 0, form), max_new_tokens=1)
        except Exception:  # of any kind: not its form
            return False
        return True

    def prompt(self) -> Inputs:
        return prompt(self.kind, self.model, 0, self.form)

    def generate(self) -> tuple[Tensor, Tensor]:
        """Logits `[2, STEPS, V]` and tokens `[2, STEPS]` of a greedy generation."""
        output = self.model.generate(
            **self.prompt(),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            suppress_tokens=NOT_GENERATED,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits, 1), output.sequences[:, -STEPS:]

    def row(self, index: int) -> Tensor:
        """Token ids of one prompt, without padding."""
        kept: Tensor = self.batch["attention_mask"][index].bool()
        return self.batch["input_ids"][index][kept]

    def sample(self, index: int, new: Tensor) -> Sample:
        """One prompt with its generated tokens, as the reference sees it."""
        ids = self.row(index)
        image = torch.isin(ids, self.image_ids)
        after = image.flip(0).cumsum(0).flip(0) == 0
        whole = torch.cat([ids, new])
        image = torch.cat([image, torch.zeros(len(new), dtype=torch.bool)])
        return Sample(whole, torch.arange(len(whole)), image, (Turn(0, len(ids), after, after),))

    def alone(self, index: int) -> Hooked:
        """The model for the reference, with the image of one prompt."""

        def run(ids: Tensor) -> Tensor:
            inputs = around(self.kind, self.model, ids[None])
            if not (ids == image_id(self.kind, self.model)).any():
                return self.text(inputs)
            if self.kind == "paligemma":  # what follows the prompt does not belong to its prefix
                inputs["token_type_ids"][:, len(self.row(index)) :] = 1
            images = {name: value for name, value in self.batch.items() if name not in inputs}
            logits: Tensor = self.model(**inputs, **_pick(images, index)).logits[0]
            return logits

        return Hooked(self.model, run, self.depth)

    def text(self, inputs: Inputs) -> Tensor:
        """Logits `[S, V]` of a prompt without an image."""
        part = TEXT_PART.get(self.kind)
        if part is not None:
            kept = ("input_ids", "attention_mask")
            inputs = {name: value for name, value in inputs.items() if name in kept}
        asked = self.model if part is None else getattr(self.model, part)
        logits: Tensor = asked(**inputs).logits[0]
        return logits


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


def made(kind: str) -> Family:
    name, changes = VARIANTS.get(kind, (kind, {}))
    with quietly():
        return Family(name, **changes)


family = lru_cache(maxsize=4)(made)
