"""Answers to batches of conversations, by the search that a task asks for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from vlm_patch.models import chat
from vlm_patch.models.chat import Response

# What a task does not ask for is off, whatever a checkpoint's generation_config.json says.
NEUTRAL: dict[str, Any] = {"max_new_tokens": 1024, "length_penalty": 1.0, **chat.GREEDY}
SAMPLING = ("temperature", "top_p", "top_k")

Conversation = Sequence[Mapping[str, Any]]


def load(
    pretrained: str,
    device: Any,
    device_map: str | None,
    chat_template: str | None = None,
    **settings: Any,
) -> tuple[Any, Any]:
    """The model, in evaluation mode on `device` (or as `device_map` says), and its processor.

    The processor pads on the left. Raises ValueError where it cannot render a conversation, which
    `chat_template` (Jinja) is for.
    """
    source = {key: settings.pop(key) for key in ("revision", "trust_remote_code")}
    given = {key: value for key, value in settings.items() if value is not None}
    placing = {} if device_map is None else {"device_map": device_map}
    processor = chat.PROCESSORS.from_pretrained(pretrained, **source)
    if not chat.prepare(processor, chat_template):
        raise ValueError(
            f"the processor of {pretrained} has no chat template, so prompts cannot be rendered: "
            "give one in --model_args, for the bare question "
            f"chat_template={chat.BARE}"
        )
    model = chat.MODELS.from_pretrained(pretrained, **source, **given, **placing)
    return (model if placing else model.to(device)).eval(), processor


def search(requests: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of `generate` for a task's generation_kwargs, and the keys that have no effect.

    Sampling needs a temperature above 0 and no `do_sample: false`, as everywhere in lmms-eval.
    """
    given = {key: requests[key] for key in NEUTRAL if requests.get(key) is not None}
    sample = bool(given.pop("do_sample", given.get("temperature", 0) > 0))
    sample = sample and given.get("temperature", 1.0) > 0
    if sample:
        settings = NEUTRAL | {"top_k": 0} | given | {"do_sample": True}
    else:
        settings = NEUTRAL | {k: v for k, v in given.items() if k not in SAMPLING}
    return settings, sorted({*requests} - {*NEUTRAL, "until"})


def stops(requests: Mapping[str, Any]) -> list[str]:
    """The texts that end an answer, from `until` (one, a list, or nothing)."""
    until = requests.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop texts, without the blanks around it."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text.strip()


def batches(kinds: Sequence[Hashable], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of requests to be answered together: of one kind, at most `size`, long ones first."""
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    order = sorted(range(len(kinds)), key=lambda index: (numbers[kinds[index]], -lengths[index]))
    result = []
    for _, group in groupby(order, key=lambda index: numbers[kinds[index]]):
        indices = list(group)
        result += [indices[start : start + size] for start in range(0, len(indices), size)]
    return result


def answer(
    model: Any, processor: Any, conversations: Sequence[Conversation], settings: Mapping[str, Any]
) -> list[Response]:
    """The answers to one batch, in order; conversations without an image run apart."""
    result: dict[int, Response] = {}
    for seeing in (True, False):
        indices = [n for n, talk in enumerate(conversations) if _has_image(talk) is seeing]
        if indices:
            requests = [conversations[index] for index in indices]
            result |= zip(indices, _generate(model, processor, requests, settings), strict=True)
    return [result[index] for index in range(len(conversations))]


def _has_image(conversation: Conversation) -> bool:
    """Whether an image is shown. Raises ValueError for what is neither image nor text."""
    kinds = {part["type"] for message in conversation for part in message["content"]}
    if strange := kinds - {"image", "text"}:
        raise ValueError(
            f"found {sorted(strange)[0]} in a question: the vlm_patch model of lmms-eval answers "
            "questions of text and images only, so choose an image task"
        )
    return "image" in kinds


@torch.inference_mode()
def _generate(
    model: Any, processor: Any, conversations: Sequence[Conversation], settings: Mapping[str, Any]
) -> list[Response]:
    inputs = chat.render(processor, conversations).to(model.device, dtype=model.dtype)
    return chat.respond(model, processor, inputs, settings)
