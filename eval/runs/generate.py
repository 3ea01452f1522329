"""Answers of a model: greedy, in left-padded batches, prompts by the processor's chat template."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers.distributed.configuration_utils import DistributedConfig

from eval import pocket
from eval.errors import EvalError
from eval.runs import images
from eval.runs.config import Config
from eval.runs.samples import Sample, notice
from vlm_patch.models import chat
from vlm_patch.models.chat import BARE, GREEDY, Response
from vlm_patch.models.info import place

PLAIN = (336, 336)
"""Size of an image that every processor takes."""


class BrokenImageError(EvalError):
    """An image that cannot be shown to the model, and the sample that needs it."""

    def __init__(self, sample: Sample, reason: str) -> None:
        super().__init__(sample, reason)  # what pickle makes it of again, from another process
        self.sample, self.reason = sample, reason

    def __str__(self) -> str:
        return f"{self.sample.name}: {self.reason}"


def load_model(config: Config) -> tuple[Any, Any]:
    """The model (in evaluation mode, on its device) and the processor that `config` names."""
    name = str(pocket.MODEL) if config.model == "pocket" else config.model
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        model, processor = chat.load(name, source, dtype=config.dtype, **placing(config))
        if config.device_map is None and config.tp_plan is None and config.quantization is None:
            model = model.to(config.device or own_device())
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise EvalError(
            f"model {config.model} cannot be loaded (expected: pocket, a folder made by "
            f"save_pretrained, or the hub id of an image-text-to-text model): {error}"
        ) from error
    notice(f"{config.model}: {place(model)}")
    return model, prepare(processor, config.model, config.chat_template)


def placing(config: Config) -> dict[str, Any]:
    """How from_pretrained is to build the model and where to put it; only what is set."""
    plan: Any = dict(config.tp_plan) if isinstance(config.tp_plan, Mapping) else config.tp_plan
    options = {
        "device_map": config.device_map,
        **({} if plan is None else _together(plan)),
        "quantization_config": config.quantization and dict(config.quantization),
        "attn_implementation": config.attn_implementation,
    }
    return {key: value for key, value in options.items() if value is not None}


def _together(plan: Any) -> dict[str, Any]:
    """What divides the model among processes in from_pretrained; transformers moved it."""
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        return {"distributed_config": DistributedConfig(tp_plan=plan)}
    return {"tp_plan": plan}


def best_device() -> str:
    """The accelerator of this machine, or the CPU."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return "cpu" if accelerator is None else str(accelerator)


def own_device() -> str:
    """This process's own accelerator where a launcher started several, one for each."""
    device, rank = best_device(), os.environ.get("LOCAL_RANK", "")
    if device == "cpu" or not rank.isdigit():
        return device
    return f"{device}:{int(rank) % torch.accelerator.device_count()}"


def prepare(processor: Any, name: str, chat_template: str | None = None) -> Any:
    """The processor made ready for batches: left padding, a padding token, a chat template."""
    if getattr(processor, "tokenizer", None) is None:
        raise EvalError(
            f"model {name}: its processor has no tokenizer ({type(processor).__name__})"
        )
    if not chat.prepare(processor, chat_template):
        raise EvalError(
            f"model {name}: its processor has no chat template, so prompts cannot be rendered; "
            f'give one in the config, for the bare question --set "chat_template={BARE}"'
        )
    return processor


@torch.inference_mode()
def ask(model: Any, processor: Any, batch: Sequence[Sample], max_new_tokens: int) -> list[Response]:
    """Greedy answers to one batch of samples."""
    inputs = encode(processor, batch)
    _check_images(model, inputs["input_ids"], batch)
    inputs = inputs.to(model.device, dtype=model.dtype)
    settings = {**GREEDY, "max_new_tokens": max_new_tokens}
    responses = chat.respond(model, processor, inputs, settings)
    return [replace(response, text=response.text.strip()) for response in responses]


def encode(processor: Any, batch: Sequence[Sample]) -> Any:
    """The batch as model inputs; EvalError names the sample that the processor cannot take.

    It is a BrokenImageError where the processor takes the same prompt with another image.
    """
    conversations = [_conversation(sample, open_image(sample)) for sample in batch]
    try:
        return chat.render(processor, conversations)
    except MemoryError:
        raise
    # processors check little, so that a strange image or template fails anywhere in them
    except Exception as error:
        if len(batch) > 1:
            for sample in batch:
                encode(processor, [sample])
        elif _takes_another_image(processor, batch[0]):
            reason = f"the processor cannot take {batch[0].image}: {error}"
            raise BrokenImageError(batch[0], reason) from error
        names = ", ".join(sample.name for sample in batch)
        raise EvalError(f"the processor cannot take {names}: {error}") from error


def _takes_another_image(processor: Any, sample: Sample) -> bool:
    """Whether an ordinary image in the place of the sample's would do, so that it is to blame."""
    try:
        chat.render(processor, [_conversation(sample, Image.new("RGB", PLAIN))])
    except Exception:
        return False
    return True


def open_image(sample: Sample) -> Image.Image:
    """The sample's image, upright and in RGB; BrokenImageError says why it cannot be read."""
    try:
        return images.read_image(sample.image)
    except images.UnreadableImageError as error:
        raise BrokenImageError(sample, str(error)) from error


def _conversation(sample: Sample, picture: Image.Image) -> list[dict[str, Any]]:
    if not sample.prompt.strip():
        raise EvalError(f"{sample.name}: the prompt is empty")
    image = {"type": "image", "image": picture}
    return [{"role": "user", "content": [image, {"type": "text", "text": sample.prompt}]}]


def _check_images(model: Any, ids: torch.Tensor, batch: Sequence[Sample]) -> None:
    """Every row of `ids` `[batch, length]` must hold the image, or a response would be blind."""
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
