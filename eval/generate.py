"""Answers of a model: greedy, in left-padded batches, prompts by the processor's chat template."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForImageTextToText, AutoProcessor

from eval import pocket
from eval.config import Config
from eval.dataset import Sample
from eval.errors import EvalError

# The Auto classes carry no types.
MODELS: Any = AutoModelForImageTextToText
PROCESSORS: Any = AutoProcessor

# Plain greedy search, whatever sampling or penalty a checkpoint's generation_config.json asks for.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


@dataclass(frozen=True)
class Answer:
    """What the model said, its length in tokens (end mark included), and whether it ended."""

    text: str
    tokens: int
    ended: bool


def load_model(config: Config) -> tuple[Any, Any]:
    """The model (in evaluation mode, on its device) and the processor that `config` names."""
    name = str(pocket.MODEL) if config.model == "pocket" else config.model
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    placing = {
        key: value
        for key in ("device_map", "attn_implementation")
        if (value := getattr(config, key)) is not None
    }
    try:
        processor = PROCESSORS.from_pretrained(name, **source)
        model = MODELS.from_pretrained(name, dtype=config.dtype, **source, **placing)
        if config.device_map is None:
            model = model.to(config.device or best_device())
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise EvalError(
            f"model {config.model} cannot be loaded (expected: pocket, a folder made by "
            f"save_pretrained, or the hub id of an image-text-to-text model): {error}"
        ) from error
    return model.eval(), prepare(processor, config.model)


def best_device() -> str:
    """The accelerator of this machine, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else str(found)


def prepare(processor: Any, name: str) -> Any:
    """The processor made ready for batches: left padding, a padding token, a chat template."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise EvalError(
            f"model {name}: its processor has no tokenizer ({type(processor).__name__})"
        )
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    if not processor.chat_template:
        raise EvalError(
            f"model {name}: its processor has no chat template, so prompts cannot be rendered; "
            f"put chat_template.jinja into a local copy of the model and name that folder"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def answers(
    model: Any, processor: Any, samples: Sequence[Sample], config: Config
) -> Iterator[list[tuple[Sample, Answer]]]:
    """The answers batch by batch, short prompts first.

    Equal prompts on one image (POPE's three strategies share the objects that are there) are asked
    once, and the answer goes to all of them.
    """
    same: dict[tuple[str, str, str], list[Sample]] = {}
    for sample in samples:
        same.setdefault((sample.task, str(sample.image), sample.prompt), []).append(sample)
    groups = sorted(same.values(), key=lambda group: (group[0].task, len(group[0].prompt)))
    for task in config.tasks:
        of_task = [group for group in groups if group[0].task == task]
        max_new_tokens = getattr(config, task).max_new_tokens
        for start in range(0, len(of_task), config.batch_size):
            batch = of_task[start : start + config.batch_size]
            found = _ask(model, processor, [group[0] for group in batch], max_new_tokens)
            yield [
                (sample, answer)
                for group, answer in zip(batch, found, strict=True)
                for sample in group
            ]


def _ask(model: Any, processor: Any, batch: Sequence[Sample], max_new_tokens: int) -> list[Answer]:
    try:
        return ask(model, processor, batch, max_new_tokens)
    except torch.OutOfMemoryError as error:
        half = max(1, len(batch) // 2)
        raise EvalError(
            f"out of memory with {len(batch)} samples at once ({error}); the answers so far are "
            f"kept: run again with --set batch_size={half}"
        ) from error


@torch.inference_mode()
def ask(model: Any, processor: Any, batch: Sequence[Sample], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to one batch of samples."""
    inputs = encode(processor, batch)
    _check_images(model, inputs["input_ids"], batch)
    inputs = inputs.to(model.device, dtype=model.dtype)
    tokenizer = processor.tokenizer
    output = model.generate(
        **inputs, **GREEDY, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = _end_tokens(model)
    return [_answer(tokenizer, tokens, ends) for tokens in new]


def encode(processor: Any, batch: Sequence[Sample]) -> Any:
    """The batch as model inputs; EvalError names the sample that the processor cannot take."""
    conversations = [_conversation(sample) for sample in batch]
    render = processor.apply_chat_template
    padding: dict[str, Any] = {"padding": True}
    if "processor_kwargs" in inspect.signature(render).parameters:  # newer transformers
        padding = {"processor_kwargs": padding}
    try:
        return render(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **padding,
        )
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        if len(batch) > 1:
            for sample in batch:
                encode(processor, [sample])
        names = ", ".join(sample.name for sample in batch)
        raise EvalError(f"the processor cannot take {names}: {error}") from error


def open_image(sample: Sample) -> Image.Image:
    """The sample's image in RGB; EvalError names the file that is missing or broken."""
    try:
        with Image.open(sample.image) as image:
            picture: Image.Image = image.convert("RGB")
    except FileNotFoundError:
        raise EvalError(f"{sample.name}: no such image: {sample.image}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise EvalError(
            f"{sample.name}: {sample.image} is not a readable image: {error}"
        ) from error
    return picture


def _conversation(sample: Sample) -> list[dict[str, Any]]:
    if not sample.prompt.strip():
        raise EvalError(f"{sample.name}: the prompt is empty")
    image = {"type": "image", "image": open_image(sample)}
    return [{"role": "user", "content": [image, {"type": "text", "text": sample.prompt}]}]


def _check_images(model: Any, ids: torch.Tensor, batch: Sequence[Sample]) -> None:
    """Every row of `ids` `[batch, length]` must hold the image, or a blind model would be asked."""
    config = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is None:
        return
    for row, sample in zip(ids, batch, strict=True):
        if not bool((row == token).any()):
            raise EvalError(
                f"{sample.name}: the rendered prompt holds no image token (id {token}); "
                f"the chat template must place the image"
            )


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _answer(tokenizer: Any, tokens: list[int], ends: set[int]) -> Answer:
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    kept = tokens if end is None else tokens[: end + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return Answer(text, len(kept), end is not None)
