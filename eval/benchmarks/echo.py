"""Captions that hold their own prompt: a sign that the prompt was not cut off the generated text.

Such a caption is longer than the response, and the words of the prompt are read as its own.
"""

import re
from collections.abc import Sequence

COMMON = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image in detail.",
    "Describe the image in detail.",
    "Generate a short caption of the image.",
    "Provide a brief description of the given image.",
)
"""Prompts for captions in papers, for files without the prompts."""

# role names only with their colon and at the start of a line or sentence: "a user: ..." is no chat
_CHAT = re.compile(
    r"(?:^|[\n.!?>\]])\s*(?:USER|ASSISTANT|Human|Assistant|User|### ?\w+):"
    r"|<\|im_(?:start|end)\|>|<\|(?:user|assistant|start_header_id)\|>|\[/?INST\]|<image>"
    r"|<(?:start|end)_of_turn>"
)


def holds_prompt(text: str, prompt: str = "") -> bool:
    """Whether a caption starts with or contains the prompt, a common one, or the marks of a chat.

    Case, white space and the final full stop of the prompt do not matter.
    """
    plain = _plain(text)
    prompts = [prompt] if prompt.strip() else COMMON
    return bool(_CHAT.search(text)) or any(_plain(each).rstrip(".?!") in plain for each in prompts)


def flags(captions: Sequence[tuple[str, str]]) -> list[str]:
    """The flag for (caption, prompt) pairs, if any holds its prompt; "" is an unknown prompt."""
    count = sum(holds_prompt(text, prompt) for text, prompt in captions)
    if not count:
        return []
    return [
        f"{count} of {len(captions)} captions hold their own prompt or marks of a chat: cut the "
        "prompt off the generated tokens before decoding"
    ]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
