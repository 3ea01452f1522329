"""The pocket world and the pocket model: what `eval` runs on where no pretrained weights are.

The world draws scenes of COCO objects from a seed, the model is a small trained LLaVA that
describes them. Both are a test bed for the machinery and for real effects of a small model; they
are no evidence about 7B models. `python -m eval.pocket.train` makes the model from nothing.
"""

from pathlib import Path
from typing import Any

import yaml

SPLITS = ("train", "calibration", "test", "break")
"""train and calibration are for making the model, test is like train, break lacks a companion."""

MODEL = Path(__file__).parent / "model"
"""The shipped weights, tokenizer and processor; `from_pretrained` reads this folder."""

WORLD: Any = yaml.safe_load((Path(__file__).parent / "world.yaml").read_text(encoding="utf-8"))
"""What there is in the pocket world: colours, objects with their drawings, themes."""

CAPTION_PROMPT = "Please describe this image in detail."
"""The instruction the model was trained on most for descriptions."""


def article(noun: str) -> str:
    """`noun` behind its indefinite article: "a cup", "an oven"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def pope_question(name: str) -> str:
    """POPE's question (arXiv:2305.10355) about one category: "Is there a cup in the image?"."""
    return f"Is there {article(name)} in the image?"
