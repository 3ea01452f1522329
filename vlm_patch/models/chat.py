"""Asking a model through its chat template: decoding settings, prompts as inputs, responses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationMixin

# The Auto classes carry no types.
MODELS: Any = AutoModelForImageTextToText
PROCESSORS: Any = AutoProcessor

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}
"""Plain greedy search, whatever a checkpoint's generation_config.json asks for."""

BARE = "{{ messages[0]['content'][-1]['text'] }}"
"""The template of a model that knows no chat: the question, the image being put before it."""


@dataclass(frozen=True)
class Response:
    """What the model generated for one prompt.

    text: without special tokens.
    tokens: number of tokens, the end token included.
    ended: an end token was generated.
    """

    text: str
    tokens: int
    ended: bool


def load(name: str, source: Mapping[str, Any], **settings: Any) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its processor; `source` goes to both of `from_pretrained`.

    load("llava-hf/llava-1.5-7b-hf", {"revision": "main"}, dtype="float16")
    """
    processor = PROCESSORS.from_pretrained(name, **source)
    return MODELS.from_pretrained(name, **source, **settings).eval(), processor


def prepare(processor: Any, chat_template: str | None = None) -> bool:
    """Makes a processor ready for batches: left padding, a padding token, a chat template. Returns
    whether it has one.
    """
    tokenizer = processor.tokenizer
    processor.chat_template = chat_template or processor.chat_template or tokenizer.chat_template
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return bool(processor.chat_template)


def render(processor: Any, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Any:
    """The padded inputs of a batch of conversations, each ending where the response begins."""
    apply = processor.apply_chat_template
    padding: dict[str, Any] = {"padding": True}
    if "processor_kwargs" in inspect.signature(apply).parameters:  # newer transformers
        padding = {"processor_kwargs": padding}
    return apply(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **padding,
    )


def respond(
    model: Any, processor: Any, inputs: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[Response]:
    """The responses to a rendered batch, in order; `settings` are those of `generate`."""
    tokenizer = processor.tokenizer
    output = model.generate(**inputs, **settings, pad_token_id=tokenizer.pad_token_id)
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = end_tokens(model)
    return [response(tokenizer, tokens, ends) for tokens in new]


def end_tokens(model: Any) -> set[int]:
    """The ids that end a response. A model with a `generate` of its own (InstructBLIP) leaves it to
    its language model.
    """
    leaves_it = type(model).generate is not GenerationMixin.generate
    part = getattr(model, "language_model", None)
    writer = part if leaves_it and isinstance(part, GenerationMixin) else model
    ends = writer.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def response(tokenizer: Any, tokens: Sequence[int], ends: set[int]) -> Response:
    """The response in generated tokens, cut behind the first end token."""
    end = next((index for index, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[: end + 1]
    return Response(tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is not None)
