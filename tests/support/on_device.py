"""Whole models on a device that is not the CPU: that of `eval.support.simulated_device`, or a card.

What a function gives on the device is compared with what it gives on the CPU; `modes_on` lets the
ways of generating of `eval.support.ways` run there while their slow reference stays on the CPU.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import vlm_patch
from eval.support import tiny, ways
from eval.support.agreement import ours, planted
from tests.support.agreement import generate
from tests.support.planted import planted as sinks_planted
from vlm_patch import GIFT, VAR, VHR
from vlm_patch.models import published
from vlm_patch.models.published import Profile

CPU = torch.device("cpu")
ELSEWHERE = {
    "layers on two devices": "a device map of its own",
    "accelerate cpu offload": "a device map of its own",
    "tensor parallel": "processes of its own, on the CPU",
    "offloaded cache": "its second place is the CPU",
    'pipeline("image-text-to-text")': "made before the model is moved",
    "gradient checkpointing in training": "compares gradients on the CPU",
}
"""Ways of generating that say themselves where what lies."""
TINY_PROFILE = Profile(
    "llama",
    4,
    tiny.WIDTH,
    4,
    {
        "var": {"dims": tiny.SINK_DIMS},
        "gift": {"alpha": 3.0, "saliency_layer": 1, "layers": (2, 3)},
        "vhr": {"layers": (1, 2, 3)},
    },
)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors and models inside `value` on `device`; all else, caches too, as it is."""
    if isinstance(value, Tensor | nn.Module):
        return value.to(device)
    if isinstance(value, ModelOutput):
        there = copy.copy(value)
        for key, item in value.items():
            there[key] = moved(item, device)
        return there
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(moved(item, device) for item in value)
    return value


@contextmanager
def modes_on(device: torch.device) -> Iterator[None]:
    """The models of `eval.support.ways` lie on `device` while they are patched."""
    plain, generate, forward = vlm_patch.wrap, ways.generate, ways.forward

    @contextmanager
    def wrap(model: nn.Module, *methods: Any, **options: Any) -> Iterator[Any]:
        model.to(device)
        try:
            with plain(model, *methods, **options) as patch:
                yield patch
        finally:
            model.to(CPU)

    def back(output: Any) -> Any:
        for name in ("sequences", "logits", "scores", "beam_indices", "attentions"):
            if output.get(name) is not None:
                output[name] = moved(output[name], CPU)
        return output

    def generate_there(model: nn.Module, batch: Any, *more: Any, **options: Any) -> Any:
        there = moved(batch, device), *more
        if device.type == "cuda":  # transformers would compile there, which takes minutes
            options = {"disable_compile": True} | options
        return back(generate(model, *there, **moved(options, device)))

    def forward_there(model: nn.Module, **inputs: Any) -> Any:
        return back(forward(model, **moved(inputs, device)))

    with (
        mock.patch.object(vlm_patch, "wrap", wrap),
        mock.patch.object(ways, "generate", generate_there),
        mock.patch.object(ways, "forward", forward_there),
    ):
        yield


# ---- what the ways of `eval.support.ways` leave out: defaults, switches, masks by hand


def answered(
    device: torch.device,
    methods: Sequence[Any],
    rows: Sequence[Sequence[int]] = tiny.BATCH_OF_3,
    kind: str = "llava",
    late: bool = False,
    **options: Any,
) -> list[Tensor]:
    """The tokens, and the logits of every step, of a patched model on `device`.

    late: it is moved when it is patched already.
    """
    model = planted(kind)
    batch = moved(tiny.inputs(model, rows), device)
    if not late:
        model.to(device)
    with vlm_patch.wrap(model, *methods, **options):
        model.to(device)
        output = generate(model, batch, steps=4)
    return moved([output.sequences, *output.logits], CPU)


def alone(name: str) -> Callable[[torch.device], list[Tensor]]:
    """A method with all its defaults."""
    return lambda device: answered(device, [name])


def by_profile(device: torch.device) -> list[Tensor]:
    with mock.patch.object(published, "PROFILES", (TINY_PROFILE,)):
        return answered(device, ["var", "gift", "vhr"])


def found_sinks(device: torch.device) -> list[Tensor]:
    """The search for sinks finds those that were planted, and VAR acts by them."""
    model, inputs = sinks_planted("llava")
    model.to(device)
    inputs = moved(inputs, device)
    with vlm_patch.wrap(model, VAR(min_image_mass=0.0, rho_nonsink=0.0)) as patch:
        with torch.no_grad():
            output = model(**inputs)
        assert "dims=(3, 10)" in patch.describe(), patch.describe()
    return [output.logits.to(CPU)]


def some_heads(device: torch.device) -> list[Tensor]:
    model = planted("llava").to(device)
    batch = moved(tiny.inputs(model.to(CPU), tiny.MIXED_BATCH), device)
    model.to(device)
    with vlm_patch.wrap(model, *ours(("var", "gift-inside", "vhr"))) as patch:
        for name in patch.heads:
            patch.heads[name][:, ::2] = False
        first = generate(model, batch, steps=3)
        patch.heads["var"][1:3] = torch.tensor([True, False, False, True]).to(device)
        output = generate(model, batch, steps=3)
        with patch.disabled("vhr"):
            third = generate(model, batch, steps=2)
    found = [one for each in (first, output, third) for one in (each.sequences, *each.logits)]
    return moved(found, CPU)


def masks(there: bool) -> Callable[[torch.device], list[Tensor]]:
    """Masks by hand, on the device or left on the CPU."""

    def run(device: torch.device) -> list[Tensor]:
        model = planted("llava")
        batch = tiny.inputs(model, tiny.BATCH_OF_3)
        ids = batch["input_ids"]
        query = (ids == tiny.IMAGE).flip(1).cumsum(1).flip(1) == 0
        given = [ids == tiny.IMAGE, query & (ids != 43), query & (ids != 24)]
        image, query, words = moved(given, device if there else CPU)
        model.to(device)
        gift = GIFT(3.0, saliency_layer=1, layers=(2, 3), words=words)
        with (
            vlm_patch.wrap(model, *ours(("var",)), gift) as patch,
            patch.prompt(image=image, query=query),
        ):
            output = generate(model, moved(batch, device), steps=3, num_beams=2)
        return [output.sequences.to(CPU)]

    return run


def second_turn(device: torch.device) -> list[Tensor]:
    model = planted("llava")
    batch = moved(tiny.inputs(model, tiny.BATCH_OF_3), device)
    model.to(device)
    with vlm_patch.wrap(model, "var", "gift", "vhr"):
        first = generate(model, batch, steps=3)
        asked = torch.tensor([[70, 71, tiny.SINK_WORD, 72]], device=device).expand(3, -1)
        ids = torch.cat([first.sequences, asked], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids)], 1)[:, : ids.shape[1]]
        again = {"input_ids": ids, "attention_mask": mask}
        second = generate(model, again | {"past_key_values": first.past_key_values}, steps=3)
    return moved([second.sequences, *second.logits], CPU)


def with_processor(device: torch.device) -> list[Tensor]:
    """The question is found by the chat template, its content words by their letters."""
    model, processor = planted("llava"), tiny.processor()
    texts = "Is there a dog ?", "Please describe this image in detail."
    talks = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in texts
    ]
    prompts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    batch = moved(tiny.inputs(model, ids), device)
    model.to(device)
    with vlm_patch.wrap(model, "gift", "vhr", processor=processor):
        output = generate(model, batch, steps=3)
    return moved([output.sequences, *output.logits], CPU)


CASES: dict[str, Callable[[torch.device], list[Tensor]]] = {
    **{f"{name} with its defaults": alone(name) for name in ("var", "gift", "vhr")},
    "all with their defaults, beside each other": lambda device: answered(
        device, ["var", "gift", "vhr"], tiny.MIXED_BATCH
    ),
    "all with their defaults, Qwen2-VL": lambda device: answered(
        device, ["var", "gift", "vhr"], tiny.MIXED_BATCH, "qwen2-vl"
    ),
    "moved when it is patched": lambda device: answered(
        device, ours(("var", "gift-inside", "vhr")), late=True
    ),
    "the release's semantics": lambda device: answered(
        device, [*ours(("var-release",)), GIFT(), VHR(semantics="release")]
    ),
    "the paper's semantics": lambda device: answered(device, ours(("var-all-fields", "vhr-paper"))),
    "layers and heads of wrap": lambda device: answered(
        device, ours(("var", "gift", "vhr")), layers="1-3", heads={"var": "1:0,3; 2:*"}
    ),
    "a profile": by_profile,
    "sinks that are found": found_sinks,
    "some heads": some_heads,
    "masks by hand on the CPU": masks(False),
    "masks by hand on the device": masks(True),
    "second turn with defaults": second_turn,
    "with a processor": with_processor,
}
