"""A tiny random InstructBLIP with its processor, which knows no chat, as files on disk."""

from pathlib import Path

import transformers
from transformers import InstructBlipProcessor, PreTrainedTokenizerFast

from eval.support.build import build
from eval.support.tiny_text import tokenizer

# the one that needs no torchvision goes by another name since transformers 5
ImageProcessor = getattr(transformers, "BlipImageProcessorPil", None)
if ImageProcessor is None:
    ImageProcessor = transformers.BlipImageProcessor
QUERIES = 16


def save(folder: Path) -> Path:
    """The model folder as save_pretrained leaves it; images are QUERIES tokens."""
    build("instructblip").save_pretrained(folder)
    pixels = ImageProcessor(size={"height": 32, "width": 32})
    InstructBlipProcessor(pixels, _plain(), _plain(), QUERIES).save_pretrained(folder)
    return folder


def _plain() -> PreTrainedTokenizerFast:
    """Without an image token: the processor adds its own."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer,
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
